r"""Exact evaluation: values, gaps, divergences, coverage, and whether theta* is in the set.

All are sums over contexts and actions, nothing is sampled. Gaps and values are in units of
reward, divergences in nats.

Axes: ``contexts``, ``actions``, ``dim``.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jax_klrlhf.bandit import pessimism
from jax_klrlhf.bandit.learner import Estimate
from jax_klrlhf.bandit.problem import Duels, Problem, Setting
from jax_klrlhf.core import divergence, ellipsoid, gibbs, numerics, uncertainty
from jax_klrlhf.core.numerics import Scalar


class Round(NamedTuple):
    """What a record function may look at: one round, as it stands when its pairs are labelled."""

    number: Int[Array, ""]
    """From 0."""
    state: Any
    """The learner's, before this round's data."""
    log_prob: Float[Array, "contexts actions"]
    """Deployed during this round: ``policy(state)``."""
    data: Duels
    """This round's."""


def check_log_prob(setting: Setting, log_prob: Float[Array, "..."]) -> None:
    """ValueError for what is no policy ``[contexts, actions]`` in logarithms, where concrete."""
    wanted = f"log-probabilities {setting.where.shape}, each context's exp summing to 1"
    if log_prob.shape != setting.where.shape:
        raise ValueError(f"wanted {wanted}; got an array of shape {log_prob.shape}")
    if isinstance(log_prob, Tracer) or isinstance(setting.where, Tracer):
        return
    given = np.where(np.asarray(setting.where), np.asarray(log_prob, np.float64), -np.inf)
    with np.errstate(over="ignore"):
        total = np.exp(given).sum(-1)
    off = ~(abs(total - 1) < 1e-3)
    if off.any():
        row = int(np.flatnonzero(off)[0])
        plain = np.where(np.asarray(setting.where), np.asarray(log_prob, np.float64), 0).sum(-1)
        looks = (
            "these are probabilities: give jnp.log of them"
            if (abs(plain - 1) < 1e-3).all()
            else "subtract its logsumexp"
        )
        raise ValueError(
            f"wanted {wanted}; exp of what was given sums to {total[row]:.4g} in context {row}: "
            f"{looks}"
        )


def optimum(problem: Problem) -> Float[Array, "contexts actions"]:
    r"""Log-probabilities of :math:`\pi^*`, the Gibbs policy of the true reward."""
    s = problem.setting
    return gibbs.log_prob(problem.reward, s.ref_log_prob, kl_coef=s.kl_coef, where=s.where)


def value(problem: Problem, log_prob: Float[Array, "contexts actions"]) -> Float[Array, ""]:
    r"""The objective :math:`J(\pi)`, expectation over contexts included."""
    s = problem.setting
    check_log_prob(s, log_prob)
    return s.context_prob @ gibbs.value(
        log_prob, problem.reward, s.ref_log_prob, kl_coef=s.kl_coef, where=s.where
    )


def gap(problem: Problem, log_prob: Float[Array, "contexts actions"]) -> Float[Array, ""]:
    r""":math:`J(\pi^*) - J(\pi) = \eta\, E_x \mathrm{KL}(\pi \| \pi^*)`, exact and never negative.

    Computed as the divergence, which doesn't cancel near the optimum as two values would.
    """
    s = problem.setting
    check_log_prob(s, log_prob)
    return s.context_prob @ gibbs.gap(
        log_prob, problem.reward, s.ref_log_prob, kl_coef=s.kl_coef, where=s.where
    )


def reward_gap(problem: Problem, log_prob: Float[Array, "contexts actions"]) -> Float[Array, ""]:
    """Expected reward below the best action's, without the KL term: arXiv 2301.11270's measure."""
    s = problem.setting
    check_log_prob(s, log_prob)
    best = jnp.max(jnp.where(s.where, problem.reward, -jnp.inf), -1)
    prob = jnp.exp(jnp.where(s.where, log_prob, -jnp.inf))
    return s.context_prob @ (best - jnp.sum(prob * problem.reward, -1))


def kl(setting: Setting, log_prob: Float[Array, "contexts actions"]) -> Float[Array, ""]:
    r""":math:`E_x \mathrm{KL}(\pi \| \pi_0)`, in nats."""
    check_log_prob(setting, log_prob)
    return setting.context_prob @ divergence.categorical(
        log_prob, setting.ref_log_prob, where=setting.where
    )


def record_gap(problem: Problem, this: Round) -> Float[Array, ""]:
    """For ``simulate(record=)``: gap of the policy deployed in each round.

    For ``simulate(total=)`` it gives the regret over rounds; times the batch size, over
    comparisons.
    """
    return gap(problem, this.log_prob)


def error(problem: Problem, estimate: Estimate) -> Float[Array, ""]:
    r"""Realized error :math:`\|\hat\theta - \theta^*\|_\Sigma`: the smallest sufficient radius."""
    off = estimate.theta - problem.theta
    return numerics.safe_sqrt(off @ estimate.ellipsoid.precision @ off)


def in_confidence_set(problem: Problem, estimate: Estimate, *, radius: Scalar) -> Bool[Array, ""]:
    """Whether theta* lies in the confidence set of that radius (statement L3)."""
    return error(problem, estimate) <= radius


def coverage(
    setting: Setting,
    target_log_prob: Float[Array, "contexts actions"],
    first_log_prob: Float[Array, "contexts actions"],
    second_log_prob: Float[Array, "contexts actions"] | None = None,
    *,
    ridge: Scalar,
    nu: Float[Array, "..."] | None = None,
) -> Float[Array, ""]:
    r"""Coverage coefficient of a policy by a design, in the limit of much data.

    .. math:: E_{x, a \sim \pi} \|\phi(x, a) - \nu\|_{V^{-1}}, \qquad
        V = E_{x \sim d_0, a^1 \sim \mu_1, a^2 \sim \mu_2}\, z z^\top + \text{ridge}\, I

    ``second`` is ``first`` by default, and ``ridge`` is per comparison here. It is the limit of
    :math:`\sqrt n\, E_\pi\|\phi - \nu\|_{\Sigma_n^{-1}}`, the factor of the offline bounds: the
    larger, the worse pi is covered. About ``sqrt(dim)`` where the design covers everything alike.
    """
    check_log_prob(setting, target_log_prob)
    second_log_prob = first_log_prob if second_log_prob is None else second_log_prob
    first = jnp.exp(jnp.where(setting.where, first_log_prob, -jnp.inf))
    second = jnp.exp(jnp.where(setting.where, second_log_prob, -jnp.inf))
    weight = setting.context_prob[:, None, None] * first[:, :, None] * second[:, None, :]
    z = setting.features[:, :, None, :] - setting.features[:, None, :, :]
    dim = z.shape[-1]
    state = ellipsoid.init(dim, ridge=ridge, dtype=z.dtype)
    state = ellipsoid.update(state, z.reshape(-1, dim), weights=weight.reshape(-1))
    return uncertainty.pointwise(
        state,
        setting.features,
        target_log_prob,
        context_prob=setting.context_prob,
        nu=pessimism.nu_of_contexts(setting, nu),
        where=setting.where,
    )


def information(problem: Problem, this: Round) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""For ``simulate(total=)``: both sides of statement L4 for one round of a linear learner.

    .. math:: \log\Big(1 + \sum_{i} \|z_i\|^2_{\Sigma_t^{-1}}\Big)
        \le \log\det\Sigma_{t+1} - \log\det\Sigma_t

    with the sum over the round's batch: :math:`\det(I + A) \ge 1 + \mathrm{tr} A`. With one
    comparison per round the two are equal. (A sum of logarithms over the comparisons of a batch,
    all in the norm from before it, would be the *larger* side.)
    """
    s, data = problem.setting, this.data
    state = this.state.ellipsoid
    z = s.features[data.context, data.first] - s.features[data.context, data.second]
    square = ellipsoid.norm(state, z) ** 2
    after = ellipsoid.update(state, z, weights=data.weight)
    gained = ellipsoid.log_det(after) - ellipsoid.log_det(state)
    return jnp.log1p(data.weight @ square), gained
