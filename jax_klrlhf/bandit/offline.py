"""Offline learners: the data come from a fixed behaviour policy, and what is learned is deployed.

They differ in the policy made of the same estimate. ``behaviour`` (pi0 by default) is where both
actions of every comparison are drawn; recorded data enter by ``update`` or ``simulate(offline=)``
instead. ``nu`` is the reference vector of the uncertainty, E phi under pi0 by default.

Axes: ``contexts``, ``actions``, ``dim``, ``batch``.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jax_klrlhf.bandit import pessimism
from jax_klrlhf.bandit.learner import Estimate, Learner, Proposal, draw, mle_policy, reward_learner
from jax_klrlhf.bandit.problem import Setting
from jax_klrlhf.core.numerics import Scalar

Propose = Callable[[Key[Array, ""], Setting, Estimate, Int[Array, " batch"]], Proposal]
Nu = Float[Array, "..."] | None  # [dim] or [contexts, dim]
Behaviour = Float[Array, "contexts actions"] | None


def offline_greedy(
    *, behaviour: Behaviour = None, ridge: Scalar = 1.0, bound: Scalar | None = None
) -> Learner:
    """Gibbs policy of the maximum-likelihood reward: what plain DPO or RLHF does."""
    return reward_learner(from_behaviour(behaviour), mle_policy, ridge=ridge, bound=bound)


def offline_gshf_one(
    *,
    radius: Scalar,
    nu: Nu = None,
    behaviour: Behaviour = None,
    ridge: Scalar = 1.0,
    bound: Scalar | None = None,
) -> Learner:
    """Offline GSHF, Option I: pessimism about the expected features (arXiv 2312.11456, Alg. 1).

    Solved as a saddle point, see :func:`jax_klrlhf.bandit.pessimism.option_one`, whose certificate
    of accuracy can be had by calling it on the final state.
    """

    def policy(setting: Setting, state: Estimate) -> Float[Array, "contexts actions"]:
        return pessimism.option_one(setting, state, radius=radius, nu=nu).log_prob

    return reward_learner(from_behaviour(behaviour), policy, ridge=ridge, bound=bound)


def offline_gshf_two(
    *,
    radius: Scalar,
    nu: Nu = None,
    behaviour: Behaviour = None,
    ridge: Scalar = 1.0,
    bound: Scalar | None = None,
) -> Learner:
    """Offline GSHF, Option II: Gibbs policy of the pointwise pessimistic reward (2312.11456)."""

    def policy(setting: Setting, state: Estimate) -> Float[Array, "contexts actions"]:
        return pessimism.option_two(setting, state, radius=radius, nu=nu)

    return reward_learner(from_behaviour(behaviour), policy, ridge=ridge, bound=bound)


def kl_pcb(
    *,
    radius: Scalar,
    behaviour: Behaviour = None,
    ridge: Scalar = 1.0,
    bound: Scalar | None = None,
) -> Learner:
    """KL-PCB (arXiv 2502.06051), specialized to linear rewards and comparisons.

    Pessimism with the uncertainty measured in each context from that context's own mean under
    the behaviour policy: the usual way to remove the shift that comparisons leave unknown. The
    paper has a general function class; this linear form is our reading of its abstract
    (pessimism, an extension to dueling bandits), not compared with its algorithm line by line.
    """

    def policy(setting: Setting, state: Estimate) -> Float[Array, "contexts actions"]:
        log_prob = setting.ref_log_prob if behaviour is None else behaviour
        nu = setting.local(state.theta).mean_features(log_prob)
        return pessimism.option_two(setting, state, radius=radius, nu=nu)

    return reward_learner(from_behaviour(behaviour), policy, ridge=ridge, bound=bound)


def pessimistic_mle(
    *,
    radius: Scalar,
    nu: Nu = None,
    behaviour: Behaviour = None,
    ridge: Scalar = 1.0,
    bound: Scalar | None = None,
) -> Learner:
    """Pessimistic MLE (arXiv 2301.11270, Algorithm 1): the action with the best lower bound.

    No KL term: the policy is deterministic, one action per context (the first among equals), so
    its KL-regularized gap counts what that costs. The lower bound is taken pointwise; the paper's
    norm of the expected features is the same with one context and less pessimistic with more.
    ``radius=0`` is the greedy MLE that the paper compares with.
    """

    def policy(setting: Setting, state: Estimate) -> Float[Array, "contexts actions"]:
        bonus = pessimism.bonus(setting, state, nu=nu)
        lower = setting.reward(state.theta) - radius * bonus
        best = jnp.argmax(jnp.where(setting.where, lower, -jnp.inf), -1)
        chosen = jnp.arange(lower.shape[-1])[None, :] == best[:, None]
        return jnp.where(chosen, jnp.zeros_like(lower), -jnp.inf)

    return reward_learner(from_behaviour(behaviour), policy, ridge=ridge, bound=bound)


def from_behaviour(behaviour: Behaviour) -> Propose:
    """Both actions from a fixed policy (pi0 if None), whatever has been learned."""

    def propose(
        key: Key[Array, ""], setting: Setting, state: Estimate, context: Int[Array, " batch"]
    ) -> Proposal:
        del state
        log_prob = setting.ref_log_prob if behaviour is None else behaviour
        if log_prob.shape != setting.where.shape:
            raise ValueError(
                f"behaviour has shape {log_prob.shape}, expected {setting.where.shape}: the "
                "log-probability of each action in each context"
            )
        return draw(key, log_prob, log_prob, context)

    return propose
