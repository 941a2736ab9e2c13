"""Learners that remember more than their data: two-stage sampling, and a reference that moves.

Axes: ``contexts``, ``actions``, ``dim``, ``batch``.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jax_klrlhf.bandit.learner import Estimate, Learner, Proposal, draw, mle_policy, reward_learner
from jax_klrlhf.bandit.offline import from_behaviour, offline_greedy
from jax_klrlhf.bandit.problem import Duels, Setting
from jax_klrlhf.core import gibbs
from jax_klrlhf.core.numerics import Scalar


class TwoStage(NamedTuple):
    """The estimate on all data, the one frozen when the first stage ended, and the count."""

    estimate: Estimate
    frozen: Float[Array, " dim"]
    seen: Float[Array, ""]


def two_stage(*, first_stage: Scalar, ridge: Scalar = 1.0, bound: Scalar | None = None) -> Learner:
    """Two-stage mixed-policy sampling (arXiv 2411.04625, TMPS from preference feedback).

    Until ``first_stage`` comparisons have been seen both actions come from pi0; from then on both
    come from the Gibbs policy of the estimate as it stood at that moment. The estimate that is
    deployed uses all data. A stage ends with the round in which it fills up. Weights count as
    comparisons, so that offline data shorten the first stage. That the second stage draws both
    actions from the intermediate policy is our reading: only the abstract was at hand.
    """
    base = reward_learner(from_behaviour(None), mle_policy, ridge=ridge, bound=bound)

    def init(setting: Setting, *, capacity: int) -> TwoStage:
        estimate = base.init(setting, capacity=capacity)
        return TwoStage(estimate, estimate.theta, jnp.zeros((), estimate.theta.dtype))

    def propose(
        key: Key[Array, ""], setting: Setting, state: TwoStage, context: Int[Array, " batch"]
    ) -> Proposal:
        sampler = mle_policy(setting, state.estimate._replace(theta=state.frozen))
        log_prob = jnp.where(state.seen < first_stage, setting.ref_log_prob, sampler)
        return draw(key, log_prob, log_prob, context)

    def update(setting: Setting, state: TwoStage, data: Duels) -> TwoStage:
        estimate = base.update(setting, state.estimate, data)
        frozen = jnp.where(state.seen < first_stage, estimate.theta, state.frozen)
        return TwoStage(estimate, frozen, state.seen + jnp.sum(data.weight))

    def policy(setting: Setting, state: TwoStage) -> Float[Array, "contexts actions"]:
        return mle_policy(setting, state.estimate)

    return Learner(init, propose, update, policy)


class Moving(NamedTuple):
    """The estimate on all data, and the sum of all estimates so far: the policy's own reward."""

    estimate: Estimate
    accumulated: Float[Array, " dim"]


def moving_reference(*, ridge: Scalar = 1.0, bound: Scalar | None = None) -> Learner:
    r"""Ablation: each round's policy is regularized to the previous iterate instead of pi0.

    .. math:: \pi_{t+1} \propto \pi_t\, e^{\langle\hat\theta_{t+1}, \phi\rangle/\eta}
              \quad\Rightarrow\quad
              \pi_{t} \propto \pi_0\, e^{\langle \sum_{s \le t} \hat\theta_s, \phi\rangle/\eta}

    The released training loop of arXiv 2312.11456 moves the reference so; as arXiv 2409.02392
    shows, it then solves the *unregularized* problem: the KL to pi0 grows with every update and the
    gap of the regularized objective with it. On-policy pairs. Here to show that, nothing else.
    When called, ValueError for rewards that are not linear: their parameters do not add up.
    """
    base = offline_greedy(ridge=ridge, bound=bound)

    def init(setting: Setting, *, capacity: int) -> Moving:
        if not setting.reward_class.is_linear:
            raise ValueError("moving_reference adds up parameters: it takes linear rewards alone")
        estimate = base.init(setting, capacity=capacity)
        return Moving(estimate, jnp.zeros_like(estimate.theta))

    def propose(
        key: Key[Array, ""], setting: Setting, state: Moving, context: Int[Array, " batch"]
    ) -> Proposal:
        log_prob = policy(setting, state)
        return draw(key, log_prob, log_prob, context)

    def update(setting: Setting, state: Moving, data: Duels) -> Moving:
        estimate = base.update(setting, state.estimate, data)
        # A batch of nothing is no round: the reference moves only where something was learned.
        moved = jnp.where(jnp.any(data.weight > 0), estimate.theta, 0)
        return Moving(estimate, state.accumulated + moved)

    def policy(setting: Setting, state: Moving) -> Float[Array, "contexts actions"]:
        return gibbs.log_prob(
            setting.reward(state.accumulated),
            setting.ref_log_prob,
            kl_coef=setting.kl_coef,
            where=setting.where,
        )

    return Learner(init, propose, update, policy)
