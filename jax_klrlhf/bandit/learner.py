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
from jax_klrlhf.core import ellipsoid, estimation, gibbs, reward_class
from jax_klrlhf.core.numerics import Scalar


class Proposal(NamedTuple):
    """Actions to compare, one pair per entry of ``batch``."""

    first: Int[Array, " batch"]
    second: Int[Array, " batch"]


class Learner(NamedTuple):
    """An algorithm, as four pure functions over a state of its own.

    ``simulate`` plays them; :func:`reward_learner`, ``from_rule`` and ``from_target`` make them of
    less. A learner sees the :class:`~jax_klrlhf.bandit.problem.Setting`, never the reward.
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
    """State of the learners that fit a reward: data, estimate, and confidence ellipsoid.

    The confidence set is ``{theta : ||theta - theta_hat||_Sigma <= radius}`` with
    ``Sigma = ridge I + sum z z'`` over the feature differences seen (of gradients, where rewards
    are not linear: :mod:`core.reward_class`).
    """

    history: history.History
    theta: Float[Array, " parameters"]
    ellipsoid: Any
    converged: Bool[Array, ""]  # of the latest refit, and no comparison was beyond the capacity


def reward_learner(
    propose: Callable[[Key[Array, ""], Setting, Estimate, Int[Array, " batch"]], Proposal],
    policy: Callable[[Setting, Estimate], Float[Array, "contexts actions"]],
    *,
    ridge: Scalar = 1.0,
    bound: Scalar | None = None,
    curvature: Callable[[Array], Array] | None = None,
) -> Learner:
    r"""A learner that refits the MLE of the setting's preference model on all data so far.

    .. math:: \hat\theta = \arg\min_\theta \sum \ell(r_\theta(x, a^1) - r_\theta(x, a^2), y)
              + \tfrac{\text{ridge}}{2} \|\theta - \theta_0\|^2

    with the setting's class of rewards, by default the linear one (theta_0 = 0) and Bradley-Terry,
    whose loss is :math:`-\log \sigma((2 y - 1) \langle\theta, z\rangle)`.

    With ``bound`` the minimum is taken over ``||theta|| <= bound``, as in arXiv 2312.11456 (a
    constrained solve, several times slower; linear rewards only, ValueError otherwise). With
    ``curvature`` (that of the likelihood, :func:`core.bradley_terry.curvature`) Sigma is the
    Hessian at the estimate, every comparison so far weighted by what its label can still say, as in
    arXiv 2402.10500; without it Sigma is the one of the confidence set. Of rewards that are not
    linear Sigma is that of the gradients at the estimate, anew at each refit. What is left to say
    is how it samples (``propose``) and what it deploys (``policy``), both as functions of the
    :class:`Estimate`.
    """

    def init(setting: Setting, *, capacity: int) -> Estimate:
        theta = setting.reward_class.start(setting.features.shape[-1], setting.features.dtype)
        return Estimate(
            history.init(setting, capacity=capacity),
            theta,
            ellipsoid.init(theta.shape[0], ridge=ridge, dtype=theta.dtype),
            jnp.ones((), bool),
        )

    def refitted(setting: Setting, seen: history.History, start: Array) -> Any:
        rows = history.view(seen)
        label, weight = history.labelled(rows)
        if not setting.reward_class.is_linear:
            if bound is not None:
                raise ValueError("bound= is a ball of linear rewards; this setting has others")
            return reward_class.fit(
                setting.reward_class,
                history.both(setting, rows),
                label,
                ridge=ridge,
                weights=weight,
                init=start,
                link=setting.preference,
            )
        differences = history.differences(setting, seen)
        if bound is None and setting.preference.logistic:
            return refit.newton(differences, rows.wins, rows.losses, start, ridge=ridge)
        return estimation.fit(
            differences,
            label,
            ridge=ridge,
            bound=bound,
            weights=weight,
            init=start,
            link=setting.preference,
        )

    def confidence(setting: Setting, seen: history.History, theta: Array) -> ellipsoid.Ellipsoid:
        """Sigma anew, of all comparisons."""
        rows = history.view(seen)
        weight = rows.wins + rows.losses
        if curvature is not None:
            weight = weight * curvature(history.margins(setting, seen, theta))
        if not setting.reward_class.is_linear:
            both = history.both(setting, rows)
            return reward_class.confidence(
                setting.reward_class, theta, both, ridge=ridge, weights=weight
            )
        z = history.differences(setting, seen)
        start = ellipsoid.init(z.shape[-1], ridge=ridge, dtype=z.dtype)
        return start._replace(precision=start.precision + refit.gram(z, weight.astype(z.dtype)))

    def update(setting: Setting, state: Estimate, data: Duels) -> Estimate:
        seen = history.append(state.history, data)
        fit = refitted(setting, seen, state.theta)
        if setting.reward_class.is_linear and curvature is None:
            x = setting.features
            z = x[data.context, data.first] - x[data.context, data.second]
            sigma = ellipsoid.update(state.ellipsoid, z, weights=data.weight)
        else:
            sigma = confidence(setting, seen, fit.theta)
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
