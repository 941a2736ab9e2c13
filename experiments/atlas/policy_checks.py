"""Exact checks of the policy side's claims: objectives, self-play, inference (`rows.Effect`).

Where a claim is a fixed point, the effect is minus the largest entry of the exact expected gradient
there, in a tabular softmax policy: 0 if the claim holds. Where it is that something lies on the
frontier of reward against KL, it is minus the reward that is missing.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.atlas.rows import Effect
from experiments.atlas.worlds import ACTIONS, CYCLE, KL_COEF
from jax_klrlhf.core import (
    choices,
    divergence,
    fdivergence,
    gibbs,
    guided,
    links,
    measure,
    objectives,
    pairwise,
    regression,
    self_play,
    sets,
    targets,
)
from jax_klrlhf.core import policy_gradient as gradients
from jax_klrlhf.core.fdivergence import FDivergence
from jax_klrlhf.core.scores import Scores

TINY = 1e-5
"""What single precision leaves of a 0."""


def _world(key: Array, actions: int = ACTIONS) -> tuple[Array, Array]:
    keys = jax.random.split(key, 2)
    ref = jax.nn.log_softmax(jax.random.normal(keys[1], (actions,)))
    return jax.random.normal(keys[0], (actions,)), ref


def _slope(of: Callable[[Array], Array], log_prob: Array) -> Array:
    """Largest entry of a gradient over softmax policies."""
    return jnp.max(jnp.abs(jax.grad(lambda logits: of(jax.nn.log_softmax(logits)))(log_prob)))


def _with_penalty(member: FDivergence, reward: Array, ref: Array) -> Callable[[Array], Array]:
    """Policy gradient of the centred reward, a divergence's surrogate as a loss, exactly."""

    def of(log_prob: Array) -> Array:
        drawn = jax.lax.stop_gradient(jnp.exp(log_prob))
        centred = reward - drawn @ reward
        return drawn @ (KL_COEF * member.surrogate(log_prob - ref) - centred * log_prob)

    return of


def the_published_kl_term_leads_to_the_gibbs_policy(key):
    """GRPO's k3 as a loss, at the Gibbs policy; control: k2."""
    reward, ref = _world(key)
    at = gibbs.log_prob(reward, ref, kl_coef=KL_COEF)
    k3, k2 = (
        _slope(_with_penalty(member, reward, ref), at)
        for member in (fdivergence.forward_kl, fdivergence.reverse_kl)
    )
    return Effect(TINY - k3, TINY - k2)


def dividing_by_the_deviation_keeps_the_policy_stochastic(key):
    """Entropy (less 0.01) that is left of k2 over the deviation at 0.8 of the least coefficient
    with a fixed point; control: at 1.5 times it."""
    reward, ref = _world(key)

    def deviation(temperature: Array) -> Array:
        law = jnp.exp(gibbs.log_prob(reward, ref, kl_coef=temperature))
        return jnp.sqrt(jnp.maximum(law @ reward**2 - (law @ reward) ** 2, 0))

    levels = jnp.exp(jnp.linspace(-3.0, 3.0, 400))
    least = jnp.min(levels / jax.vmap(deviation)(levels))

    def left(kl_coef: Array) -> Array:
        step = lambda _, t: jnp.maximum(kl_coef * deviation(t), 1e-2)  # noqa: E731
        end = jax.lax.fori_loop(0, 400, step, jnp.float32(20.0))
        law = gibbs.log_prob(reward, ref, kl_coef=end)
        return -jnp.sum(jnp.exp(law) * law) - 0.01

    return Effect(left(0.8 * least), left(1.5 * least))


def _distance(first: Array, second: Array) -> Array:
    return jnp.sum(jnp.abs(jnp.exp(first) - jnp.exp(second))) / 2


def the_last_iterate_of_win_rate_regression_is_the_equilibrium(key):
    """0.05 less the distance of iterate 400 of DNO (pi_t as reference) from the equilibrium of a
    cycle; control: pi0 held fixed (NashMD), from the regularized one."""
    prefer = jnp.array(CYCLE)
    start = jax.nn.log_softmax(0.3 * jax.random.normal(key, (3,)))

    def run(kl_coef: float) -> Array:
        def step(_: int | Array, policy: Array) -> Array:
            won = links.win_rate(prefer, policy)
            return self_play.mirror_step(policy, won, start, step=0.5, kl_coef=kl_coef)

        return jax.lax.fori_loop(0, 400, step, start)

    uniform = jnp.zeros(3) - jnp.log(3.0)
    free = links.nash(prefer, uniform, kl_coef=0.02, steps=4000).log_prob
    held = links.nash(prefer, start, kl_coef=0.3, steps=1000).log_prob
    return Effect(0.05 - _distance(run(0.0), free), 0.05 - _distance(run(0.3), held))


def _best_of(reward: Array, ref: Array, n: int) -> Array:
    return targets.best_of(choices.enumerated(ref, reward=reward), n=n)


def best_of_n_costs_its_formula(key):
    """Best of 8 on 6 actions: minus what log n - (n - 1)/n says too much of its KL; control: 2000
    equally likely actions."""

    def error(reward: Array, ref: Array) -> Array:
        spent = divergence.categorical(_best_of(reward, ref, 8), ref)
        return -jnp.abs(jnp.log(8.0) - 7 / 8 - spent)

    many = jax.random.normal(key, (2000,))
    return Effect(error(*_world(key)), error(many, jnp.full(2000, -jnp.log(2000.0))))


def best_of_n_is_on_the_frontier(key):
    """Minus the reward that best of 4 lacks at its KL; control: the Gibbs policy."""
    reward, ref = _world(key)
    lacks = lambda law: -measure.frontier_gap(law[None], reward[None], ref[None])  # noqa: E731
    return Effect(
        lacks(_best_of(reward, ref, 4)), lacks(gibbs.log_prob(reward, ref, kl_coef=KL_COEF))
    )


def regression_and_rloo_are_one_gradient(key):
    """On one group of 8 draws; control: the group's deviation divides, as in GRPO."""
    keys = jax.random.split(key, 3)
    reward, ref, log_prob = (jax.random.normal(k, (8,)) for k in keys)

    def rloo(x: Array, advantage: Callable[..., Array]) -> Array:
        priced = gradients.regularized(reward, x - ref, kl_coef=KL_COEF)
        return gradients.surrogate(x, advantage(priced)) / KL_COEF

    def fitted(x: Array) -> Array:
        return regression.loss(regression.residual(x - ref, reward, kl_coef=KL_COEF))

    one = jax.grad(fitted)(log_prob)
    apart = lambda a: jnp.max(jnp.abs(jax.grad(rloo)(log_prob, a) - one))  # noqa: E731
    return Effect(TINY - apart(gradients.leave_one_out), TINY - apart(gradients.by_std))


def a_likelihood_term_costs_nothing(key):
    """RPO at c = 0.1: the population's gradient at the Gibbs policy; control: c = 0."""
    reward, ref = _world(key)
    first, second = (x.ravel() for x in jnp.meshgrid(*[jnp.arange(ACTIONS)] * 2, indexing="ij"))
    at = gibbs.log_prob(reward, ref, kl_coef=KL_COEF)
    won = jax.nn.sigmoid(reward[first] - reward[second])

    def of(coef: float, log_prob: Array) -> Array:
        pair = lambda x: jnp.stack([x[first], x[second]], -1)  # noqa: E731
        scores = Scores(pair(log_prob), pair(ref), jnp.ones((first.size, 2), jnp.int32))
        return jnp.mean(won * objectives.rpo(scores, kl_coef=KL_COEF, sft_coef=coef)) + jnp.mean(
            (1 - won) * objectives.rpo(scores.swapped(), kl_coef=KL_COEF, sft_coef=coef)
        )

    slope = lambda coef: _slope(functools.partial(of, coef), at)  # noqa: E731
    return Effect(TINY - slope(0.1), TINY - slope(0.0))


def a_moving_reference_still_regularizes(key):
    """TR-DPO: minus the KL to pi0 that ten rounds of soft updates add; control: no update."""
    reward, ref = _world(key)

    def spent(share: float) -> Array:
        base = policy = ref
        for _ in range(10):
            policy = gibbs.log_prob(reward, base, kl_coef=KL_COEF)
            base = pairwise.moved_reference(base, policy, share=share)
        return divergence.categorical(policy, ref)

    still = divergence.categorical(gibbs.log_prob(reward, ref, kl_coef=KL_COEF), ref)
    return Effect(still - spent(0.5), still - spent(0.0))


def greedy_gains_follow_the_set_rewards_gradient(key):
    """Cosine to the gradient of reward-weighted coverage, less 0.999; control: leave-one-out."""
    reward, log_prob = _world(key)
    classes = jnp.array([0, 0, 1, 1, 2, 2])
    groups = jnp.stack(jnp.meshgrid(*[jnp.arange(ACTIONS)] * 3, indexing="ij"), -1).reshape(-1, 3)
    worth = jnp.exp(reward)
    everyone = jnp.ones(groups.shape, bool)
    value = functools.partial(sets.weighted_coverage, worth[groups], classes[groups])

    def exact(logits: Array) -> Array:
        chance = jnp.exp(jnp.sum(jax.nn.log_softmax(logits)[groups], -1))
        return chance @ value(everyone)

    chance = jnp.exp(jnp.sum(log_prob[groups], -1))

    def estimated(logits: Array, weight: Array) -> Array:
        return chance @ jnp.sum(weight * jax.nn.log_softmax(logits)[groups], -1)

    wanted = jax.grad(exact)(log_prob)

    def cosine(weights: Callable[..., Array]) -> Array:
        found = jax.grad(estimated)(log_prob, weights(value, everyone))
        return found @ wanted / jnp.sqrt((found @ found) * (wanted @ wanted))

    return Effect(cosine(sets.greedy_marginal) - 0.999, cosine(sets.leave_one_out) - 0.999)


def a_quantile_reward_has_a_known_normalizer(key):
    """QRPO: 0.01 less the error of log Z, for a reward that is right or wrong; control: for one
    without ties, 2000 equally likely actions."""

    def error(reward: Array) -> Array:
        ref = jnp.full(reward.shape, -jnp.log(reward.size))
        below = regression.quantile(reward, reward)
        exact = jax.nn.logsumexp(ref + below / KL_COEF)
        return 0.01 - jnp.abs(exact + regression.uniform_offset(KL_COEF))

    drawn = jax.random.normal(key, (2000,))
    return Effect(error((drawn > 1.0).astype(drawn.dtype)), error(drawn))


def the_mean_value_guides_to_the_frontier(key):
    """Controlled decoding over two tokens by E r of a prefix: minus the reward that it lacks at its
    KL; control: by the soft value."""
    keys = jax.random.split(key, 3)
    first = jax.nn.log_softmax(jax.random.normal(keys[0], (4,)))
    second = jax.nn.log_softmax(jax.random.normal(keys[1], (4, 4)))
    reward = 2 * jax.random.normal(keys[2], (4, 4))
    ref = (first[:, None] + second).reshape(-1)

    def lacks(value: Array) -> Array:
        head = guided.log_prob(first, value, kl_coef=KL_COEF)
        law = (head[:, None] + guided.log_prob(second, reward, kl_coef=KL_COEF)).reshape(-1)
        return -measure.frontier_gap(law[None], reward.reshape(1, -1), ref[None])

    soft = guided.soft_value(second, reward, kl_coef=KL_COEF)
    return Effect(lacks(guided.mean_value(second, reward)), lacks(soft))
