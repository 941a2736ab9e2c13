r"""What a learner is: four pure functions over a state of its own.

Writing an algorithm means writing these; everything else (simulation, evaluation, sweeps) is
then given. The contract, which one conformance suite checks for every learner:

``init(setting, capacity=n) -> state``
    The state before any data: a pytree of arrays whose shapes depend on the setting's shapes and
    on ``capacity``, the static number of comparisons that the run can hold.
``propose(key, setting, state, context) -> Proposal``
    Two actions for each context ``[batch]``. All randomness comes from ``key``; actions that
    ``setting.where`` masks are never proposed.
``update(setting, state, data) -> state``
    The state after new :class:`~jax_klrlhf.bandit.problem.Duels`, of the same structure,
    shapes and dtypes. Rows of weight 0 change nothing. Offline data enters here too.
``policy(setting, state) -> log_prob [contexts, actions]``
    The policy that would be deployed now, the one that the learner's guarantee is about:
    normalized, -inf on masked actions. Before any data it is pi0, or the learner's own choice.

A learner sees the :class:`~jax_klrlhf.bandit.problem.Setting`, never the reward. Its
hyper-parameters are closed over, so build it inside the function that is mapped to sweep them::

    jax.vmap(lambda radius: simulate(key, problem, gshf(radius=radius), rounds=50, batch=8))(radii)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jax_klrlhf.bandit import history, refit
from jax_klrlhf.bandit.problem import Duels, Setting, draw_actions
from jax_klrlhf.core import ellipsoid, estimation, gibbs
from jax_klrlhf.core.numerics import Scalar


class Proposal(NamedTuple):
    """Actions to compare, one pair per entry of ``batch``."""

    first: Int[Array, " batch"]
    second: Int[Array, " batch"]


class Learner(NamedTuple):
    """An algorithm, as four pure functions over a state of its own.

    ``simulate`` plays them; :func:`linear`, ``from_rule`` and ``from_target`` make them of less. A
    learner sees the :class:`~jax_klrlhf.bandit.problem.Setting`, never the reward.
    """

    init: Callable[..., Any]
    """``init(setting, capacity=n) -> state`` before any data: a pytree of arrays whose shapes
    depend on the setting's and on ``capacity``, the comparisons that the run can hold."""
    propose: Callable[[Key[Array, ""], Setting, Any, Int[Array, " batch"]], Proposal]
    """``propose(key, setting, state, context) -> Proposal``: two actions in play at each context.
    """
    update: Callable[[Setting, Any, Duels], Any]
    """``update(setting, state, data) -> state``, of the same structure; rows of weight 0 change
    nothing."""
    policy: Callable[[Setting, Any], Float[Array, "contexts actions"]]
    """``policy(setting, state) -> log_prob``: what would be deployed now, normalized, -inf at
    masked actions."""


class Estimate(NamedTuple):
    """State of the learners with a linear reward: data, estimate, and confidence ellipsoid.

    The confidence set is ``{theta : ||theta - theta_hat||_Sigma <= radius}`` with
    ``Sigma = ridge I + sum z z'`` over the feature differences seen.
    """

    history: history.History
    theta: Float[Array, " dim"]
    ellipsoid: Any
    converged: Bool[Array, ""]  # of the latest refit, and no comparison was beyond the capacity


def linear(
    propose: Callable[[Key[Array, ""], Setting, Estimate, Int[Array, " batch"]], Proposal],
    policy: Callable[[Setting, Estimate], Float[Array, "contexts actions"]],
    *,
    ridge: Scalar = 1.0,
    bound: Scalar | None = None,
    curvature: Callable[[Array], Array] | None = None,
) -> Learner:
    r"""A learner that refits the MLE of the setting's preference model on all data so far.

    .. math:: \hat\theta = \arg\min_\theta \sum \ell(\langle\theta, z\rangle, y)
              + \tfrac{\text{ridge}}{2} \|\theta\|^2

    The loss of Bradley-Terry is :math:`-\log \sigma((2 y - 1) \langle\theta, z\rangle)`.

    With ``bound`` the minimum is taken over ``||theta|| <= bound``, as in arXiv 2312.11456 (a
    constrained solve, several times slower). With ``curvature`` (that of the likelihood,
    :func:`core.bradley_terry.curvature`) Sigma is the Hessian at the estimate, every comparison so
    far weighted by what its label can still say, as in arXiv 2402.10500; without it Sigma is the
    one of the confidence set. What is left to say is how it samples (``propose``) and what it
    deploys (``policy``), both as functions of the :class:`Estimate`.
    """

    def init(setting: Setting, *, capacity: int) -> Estimate:
        dim, dtype = setting.features.shape[-1], setting.features.dtype
        return Estimate(
            history.init(setting, capacity=capacity),
            jnp.zeros(dim, dtype),
            ellipsoid.init(dim, ridge=ridge, dtype=dtype),
            jnp.ones((), bool),
        )

    def update(setting: Setting, state: Estimate, data: Duels) -> Estimate:
        seen = history.append(state.history, data)
        rows = history.view(seen)
        differences = history.differences(setting, seen)
        if bound is None and setting.preference.logistic:
            fit = refit.newton(differences, rows.wins, rows.losses, state.theta, ridge=ridge)
        else:
            label, weight = history.labelled(rows)
            fit = estimation.fit(
                differences,
                label,
                ridge=ridge,
                bound=bound,
                weights=weight,
                init=state.theta,
                link=setting.preference,
            )
        z = (
            setting.features[data.context, data.first]
            - (setting.features[data.context, data.second])
        )
        if curvature is None:
            sigma = ellipsoid.update(state.ellipsoid, z, weights=data.weight)
        else:
            weight = (rows.wins + rows.losses) * curvature(differences @ fit.theta)
            start = ellipsoid.init(z.shape[-1], ridge=ridge, dtype=z.dtype)
            sigma = start._replace(
                precision=start.precision + refit.gram(differences, weight.astype(z.dtype))
            )
        return Estimate(seen, fit.theta, sigma, fit.converged & ~history.overfull(seen))

    return Learner(init, propose, update, policy)


def mle_policy(setting: Setting, state: Estimate) -> Float[Array, "contexts actions"]:
    """Gibbs policy of the estimated reward, from pi0: no bonus of either sign."""
    return gibbs.log_prob(
        setting.reward(state.theta),
        setting.ref_log_prob,
        kl_coef=setting.kl_coef,
        where=setting.where,
    )


def draw(
    key: Key[Array, ""],
    first_log_prob: Float[Array, "contexts actions"],
    second_log_prob: Float[Array, "contexts actions"],
    context: Int[Array, " batch"],
) -> Proposal:
    """``a1 ~ first(.|x)`` and ``a2 ~ second(.|x)``, independently."""
    return Proposal(*draw_actions(key, first_log_prob, second_log_prob, context))
