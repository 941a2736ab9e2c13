"""Online learners: the learner chooses the pairs, round after round.

All deploy the Gibbs policy of the maximum-likelihood reward on all data so far, taken from pi0 in
every round, except where it is said otherwise; they differ in the pairs they ask for. The batch
size is the simulation's, and may be 1. Hybrid learning is any of them with
``simulate(offline=)``.

Axes: ``contexts``, ``actions``, ``dim``, ``batch``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jax_klrlhf.bandit import pessimism
from jax_klrlhf.bandit.learner import Estimate, Learner, Proposal, draw, mle_policy, reward_learner
from jax_klrlhf.bandit.offline import Nu
from jax_klrlhf.bandit.problem import Setting
from jax_klrlhf.bandit.rules import choices, from_rule
from jax_klrlhf.core import bradley_terry, enhancer, linalg, pairs
from jax_klrlhf.core.numerics import Scalar


def gshf(
    *,
    radius: Scalar,
    ridge: Scalar = 1.0,
    bound: Scalar | None = None,
    starts: int = 4,
    iterations: int = 6,
    refinements: int = 8,
) -> Learner:
    """Online iterative GSHF with the Option I enhancer (arXiv 2312.11456, Algorithm 2).

    The main agent, which is deployed, plays without a bonus. Its opponent is the most informative
    policy within the confidence set, see :mod:`jax_klrlhf.core.enhancer`: only one of the two
    explores. ``simulate(batch=1)`` is the sequential algorithm.
    """

    def propose(
        key: Key[Array, ""], setting: Setting, state: Estimate, context: Int[Array, " batch"]
    ) -> Proposal:
        main = mle_policy(setting, state)
        opponent = enhancer.option_one(
            choices(setting, state, main),
            kl_coef=setting.kl_coef,
            radius=radius,
            starts=starts,
            iterations=iterations,
            refinements=refinements,
        )
        return draw(key, main, opponent.log_prob, context)

    return reward_learner(propose, mle_policy, ridge=ridge, bound=bound)


def greedy_against_reference(*, ridge: Scalar = 1.0, bound: Scalar | None = None) -> Learner:
    """Main agent against pi0: ``a1 ~ pi_t``, ``a2 ~ pi0``.

    The Option II enhancer of online GSHF (arXiv 2312.11456, Algorithm 2), which with
    ``simulate(offline=)`` is hybrid GSHF, and the greedy pair of arXiv 2510.24700.
    """

    def propose(
        key: Key[Array, ""], setting: Setting, state: Estimate, context: Int[Array, " batch"]
    ) -> Proposal:
        return draw(key, mle_policy(setting, state), setting.ref_log_prob, context)

    return reward_learner(propose, mle_policy, ridge=ridge, bound=bound)


def greedy(*, ridge: Scalar = 1.0, bound: Scalar | None = None) -> Learner:
    """On-policy: both actions from the current policy (arXiv 2510.24700). Nothing explores."""

    def propose(
        key: Key[Array, ""], setting: Setting, state: Estimate, context: Int[Array, " batch"]
    ) -> Proposal:
        main = mle_policy(setting, state)
        return draw(key, main, main, context)

    return reward_learner(propose, mle_policy, ridge=ridge, bound=bound)


def uniform(*, ridge: Scalar = 1.0, bound: Scalar | None = None) -> Learner:
    """Both actions uniform among those in play, whatever pi0: pure exploration."""

    def propose(
        key: Key[Array, ""], setting: Setting, state: Estimate, context: Int[Array, " batch"]
    ) -> Proposal:
        del state
        flat = jnp.where(setting.where, jnp.zeros_like(setting.ref_log_prob), -jnp.inf)
        return draw(key, flat, flat, context)

    return reward_learner(propose, mle_policy, ridge=ridge, bound=bound)


def kl_ucb(
    *, radius: Scalar, nu: Nu = None, ridge: Scalar = 1.0, bound: Scalar | None = None
) -> Learner:
    """Optimism: the Gibbs policy of the estimate plus a pointwise bonus, played against pi0.

    KL-UCB (arXiv 2502.07460) has rewards as feedback; with comparisons the opponent and the origin
    ``nu`` of the bonus have to be chosen, and these choices are a convention. The optimistic
    policy is what is deployed: it is the one whose regret the paper bounds. Read from its
    abstract and from what cites it (arXiv 2603.02155), not from its algorithm line by line.
    """

    def policy(setting: Setting, state: Estimate) -> Float[Array, "contexts actions"]:
        return pessimism.option_two(setting, state, radius=-jnp.asarray(radius), nu=nu)

    def propose(
        key: Key[Array, ""], setting: Setting, state: Estimate, context: Int[Array, " batch"]
    ) -> Proposal:
        return draw(key, policy(setting, state), setting.ref_log_prob, context)

    return reward_learner(propose, policy, ridge=ridge, bound=bound)


def thompson(*, scale: Scalar = 1.0, ridge: Scalar = 1.0, bound: Scalar | None = None) -> Learner:
    r"""Thompson sampling: each of the two agents plays the Gibbs policy of its own draw.

    :math:`\tilde\theta \sim N(\hat\theta, \text{scale}^2 \Sigma^{-1})`, once per round and agent:
    the linear form of sampling from an ensemble (arXiv 2411.01493). A Laplace posterior has the
    Hessian for Sigma, which is smaller by the curvature, at most 1/4: ``scale = 2`` is its least.
    """

    def propose(
        key: Key[Array, ""], setting: Setting, state: Estimate, context: Int[Array, " batch"]
    ) -> Proposal:
        key_theta, key_draw = jax.random.split(key)
        noise = jax.random.normal(key_theta, (2, *state.theta.shape), state.theta.dtype)
        # Sigma = L L', so L'^-1 e has covariance Sigma^-1.
        spread = noise @ linalg.inverse_factor(state.ellipsoid.precision)
        first, second = (
            mle_policy(setting, state._replace(theta=state.theta + scale * spread[k]))
            for k in range(2)
        )
        return draw(key_draw, first, second, context)

    return reward_learner(propose, mle_policy, ridge=ridge, bound=bound)


def most_uncertain(*, ridge: Scalar = 1.0, bound: Scalar | None = None) -> Learner:
    r"""Active learning: in each context the pair whose label says most of theta.

    :func:`core.pairs.most_uncertain` over all actions, with Sigma the Hessian at the estimate: APO
    (arXiv 2402.10500), except that contexts are drawn by nature. Pairs of one batch don't know of
    each other.
    """
    return from_rule(
        pairs.most_uncertain,
        fallback=None,
        ridge=ridge,
        bound=bound,
        curvature=bradley_terry.curvature,
    )
