"""Offline learners: the data come from a fixed behaviour policy, and what is learned is deployed.

They differ in the policy made of the same estimate. ``behaviour`` (pi0 by default) is where both
actions of every comparison are drawn.

Axes: ``contexts``, ``actions``, ``dim``, ``batch``.
"""

from jaxtyping import Array, Float, Int, Key

from jax_klrlhf.bandit import pessimism
from jax_klrlhf.bandit.learner import Estimate, Learner, Proposal, draw, linear, mle_policy
from jax_klrlhf.bandit.problem import Setting
from jax_klrlhf.core.numerics import Scalar


def offline_greedy(
    *,
    behaviour: Float[Array, "contexts actions"] | None = None,
    ridge: Scalar = 1.0,
) -> Learner:
    """Gibbs policy of the maximum-likelihood reward: what plain DPO or RLHF does."""
    return linear(_from(behaviour), mle_policy, ridge=ridge)


def offline_gshf_two(
    *,
    radius: Scalar,
    nu: Float[Array, " dim"] | Float[Array, "contexts dim"] | None = None,
    behaviour: Float[Array, "contexts actions"] | None = None,
    ridge: Scalar = 1.0,
) -> Learner:
    """Offline GSHF, Option II: Gibbs policy of the pointwise pessimistic reward (2312.11456)."""

    def policy(setting: Setting, state: Estimate) -> Float[Array, "contexts actions"]:
        return pessimism.option_two(setting, state, radius=radius, nu=nu)

    return linear(_from(behaviour), policy, ridge=ridge)


def _from(behaviour: Float[Array, "contexts actions"] | None):
    def propose(
        key: Key[Array, ""], setting: Setting, state: Estimate, context: Int[Array, " batch"]
    ) -> Proposal:
        del state
        log_prob = setting.ref_log_prob if behaviour is None else behaviour
        return draw(key, log_prob, log_prob, context)

    return propose
