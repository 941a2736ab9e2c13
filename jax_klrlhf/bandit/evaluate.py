r"""Exact evaluation: values, gaps, divergences, coverage, and whether theta* is in the set.

All are sums over contexts and actions, nothing is sampled. Gaps and values are in units of
reward, divergences in nats.

Axes: ``contexts``, ``actions``, ``dim``.
"""

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jax_klrlhf.bandit.learner import Estimate
from jax_klrlhf.bandit.problem import Problem, Setting
from jax_klrlhf.core import divergence, gibbs, numerics
from jax_klrlhf.core.numerics import Scalar

if TYPE_CHECKING:
    from jax_klrlhf.bandit.simulate import Round


def optimum(problem: Problem) -> Float[Array, "contexts actions"]:
    r"""Log-probabilities of :math:`\pi^*`, the Gibbs policy of the true reward."""
    s = problem.setting
    return gibbs.log_prob(problem.reward, s.ref_log_prob, kl_coef=s.kl_coef, where=s.where)


def value(problem: Problem, log_prob: Float[Array, "contexts actions"]) -> Float[Array, ""]:
    r"""The objective :math:`J(\pi)`, expectation over contexts included."""
    s = problem.setting
    return s.context_prob @ gibbs.value(
        log_prob, problem.reward, s.ref_log_prob, kl_coef=s.kl_coef, where=s.where
    )


def gap(problem: Problem, log_prob: Float[Array, "contexts actions"]) -> Float[Array, ""]:
    r""":math:`J(\pi^*) - J(\pi) = \eta\, E_x \mathrm{KL}(\pi \| \pi^*)`, exact and never negative.

    Computed as the divergence, which doesn't cancel near the optimum as two values would.
    """
    s = problem.setting
    return s.context_prob @ gibbs.gap(
        log_prob, problem.reward, s.ref_log_prob, kl_coef=s.kl_coef, where=s.where
    )


def reward_gap(problem: Problem, log_prob: Float[Array, "contexts actions"]) -> Float[Array, ""]:
    """Expected reward below the best action's, without the KL term: arXiv 2301.11270's measure."""
    s = problem.setting
    best = jnp.max(jnp.where(s.where, problem.reward, -jnp.inf), -1)
    prob = jnp.exp(jnp.where(s.where, log_prob, -jnp.inf))
    return s.context_prob @ (best - jnp.sum(prob * problem.reward, -1))


def kl(setting: Setting, log_prob: Float[Array, "contexts actions"]) -> Float[Array, ""]:
    r""":math:`E_x \mathrm{KL}(\pi \| \pi_0)`, in nats."""
    return setting.context_prob @ divergence.categorical(
        log_prob, setting.ref_log_prob, where=setting.where
    )


def record_gap(problem: Problem, this: "Round") -> Float[Array, ""]:
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
