"""Saddle points: certificates, brute force, and what max-min is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import aggregate, divergence, gibbs, groups, saddle

KL_COEFS = (0.02, 0.1, 1.0)


def world(key, members=3, contexts=2, actions=5):
    key_r, key_ref = jax.random.split(key)
    ref = jax.nn.log_softmax(jax.random.normal(key_ref, (contexts, actions)))
    rewards = jax.random.normal(key_r, (members, contexts, actions))
    return aggregate.centre(rewards, ref), ref


NOMINAL = jax.jit(jax.vmap(lambda r, p, n: saddle.simplex(r, p, kl_coef=0.3, nominal=n)))


def objective(log_prob, rewards, ref, kl_coef, reduce=jnp.min):
    """Each policy's own worst case, from its definition; uniform contexts."""
    values = jnp.einsum("xa,mxa->m", jnp.exp(log_prob), rewards) / ref.shape[0]
    return reduce(values) - kl_coef * divergence.categorical(log_prob, ref).mean()


@pytest.fixture(scope="module")
def solved():
    """64 worlds and three coefficients in one program, in float32."""
    keys = jax.random.split(jax.random.key(0), 64)
    rewards, ref = jax.vmap(world)(keys)
    solve = lambda r, p, k: saddle.simplex(r, p, kl_coef=k)  # noqa: E731
    over = jax.vmap(jax.vmap(solve, in_axes=(0, 0, None)), in_axes=(None, None, 0))
    return rewards, ref, jax.jit(over)(rewards, ref, jnp.array(KL_COEFS))


def test_the_gap_is_below_1e_6_in_float32_under_jit_and_vmap_at_every_coefficient(solved):
    rewards, ref, found = solved
    assert found.duality_gap.dtype == jnp.float32
    assert float(found.duality_gap.max()) < 1e-6
    assert (found.weight >= 0).all()
    np.testing.assert_allclose(found.weight.sum(-1), 1, rtol=1e-5)
    with jax.enable_x64(True):
        # What the float32 policy is worth, and the optimum, both in float64.
        wide = lambda x: jnp.asarray(np.asarray(x), jnp.float64)  # noqa: E731
        r, p = wide(rewards), wide(ref)
        for k, kl_coef in enumerate(np.float32(KL_COEFS)):
            own = jax.vmap(lambda q, r, p, k=kl_coef: objective(q, r, p, float(k)))
            best = jax.jit(
                jax.vmap(lambda r, p, k=kl_coef: saddle.simplex(r, p, kl_coef=float(k)))
            )(r, p)
            assert best.duality_gap.max() < 1e-12
            law = jax.nn.log_softmax(wide(found.log_prob[k]))
            assert (own(best.log_prob, r, p) - own(law, r, p)).max() < 1e-6


def test_multipliers_and_the_ball_are_as_exact_in_float32():
    rewards, ref = jax.vmap(world)(jax.random.split(jax.random.key(0), 64))
    kl_coefs = jnp.array([0.02, 0.1, 1.0])

    def solve(rewards, ref, kl_coef):
        free = gibbs.log_prob(rewards[0], ref, kl_coef=kl_coef)
        value = jnp.einsum("xa,xa->", jnp.exp(free), rewards[1]) / 2
        held = {"kl_coef": kl_coef, "threshold": value[None] + 0.2, "nominal": rewards[0]}
        reachable = jnp.mean(jnp.max(rewards[1], -1)) > value + 0.4
        ball = saddle.ball(rewards / 2, ref, kl_coef=kl_coef, nominal=rewards.mean(0))
        return (
            saddle.cone(rewards[1:2], ref, **held),
            saddle.free(rewards[1:2], ref, **held),
            ball.duality_gap,
            reachable,
        )

    over = jax.vmap(jax.vmap(solve, in_axes=(0, 0, None)), in_axes=(None, None, 0))
    cone, free, ball, reachable = jax.jit(over)(rewards, ref, kl_coefs)
    assert (reachable.sum(-1) > 32).all()
    for found in (cone, free):
        assert float(jnp.where(reachable, found.duality_gap, 0).max()) < 1e-6
        assert float(jnp.where(reachable, found.violation, 0).max()) < 1e-6
    assert float(jnp.abs(ball).max()) < 1e-6


def test_no_other_policy_has_a_better_worst_member(solved):
    rewards, ref, found = solved
    moved = jax.random.normal(jax.random.key(1), (200, *ref.shape))
    for k, kl_coef in enumerate(KL_COEFS):
        near = jax.nn.log_softmax(found.log_prob[k][None] + 0.1 * moved)
        value = jax.vmap(
            jax.vmap(lambda p, r, q, k=kl_coef: objective(p, r, q, k)), in_axes=(0, None, None)
        )
        best = value(found.log_prob[k][None], rewards, ref)
        assert (value(near, rewards, ref) <= best + found.duality_gap[k][None] + 1e-5).all()


@pytest.mark.slow
def test_max_min_is_neither_the_pointwise_minimum_nor_harmless_to_the_majority(solved):
    """The worst group gains over both; and the majority mostly loses; never with equal groups."""
    rewards, ref, _ = solved
    kl_coef = 0.3
    two = rewards[:, :2]
    found = jax.vmap(lambda r, p: saddle.simplex(r, p, kl_coef=kl_coef))(two, ref)
    worst = jax.vmap(lambda p, r, q: objective(p, r, q, kl_coef))
    inside = gibbs.log_prob(two.min(1), ref, kl_coef=kl_coef)
    shared = 0.9 * two[:, 0] + 0.1 * two[:, 1]
    average = gibbs.log_prob(shared, ref, kl_coef=kl_coef)
    best = worst(found.log_prob, two, ref)
    assert (best >= worst(inside, two, ref) - 1e-5).all()
    for other in (inside, average):
        gain = best - worst(other, two, ref)
        # One false alarm in 3e4, if there were no gain.
        assert gain.mean() > 4 * gain.std() / 8
    majority = lambda p: jnp.einsum("sxa,sxa->s", jnp.exp(p), two[:, 0]) / 2  # noqa: E731
    # "Unharmed": it would lose half the time or less, and 49 of 64 worlds or more one time in 1e5.
    assert (majority(average) > majority(found.log_prob)).sum() >= 49
    same = jnp.stack([two[:, 0], two[:, 0]], 1)
    equal = jax.vmap(lambda r, p: saddle.simplex(r, p, kl_coef=kl_coef))(same, ref)
    alone = gibbs.log_prob(two[:, 0], ref, kl_coef=kl_coef)
    np.testing.assert_allclose(jnp.exp(equal.log_prob), jnp.exp(alone), atol=1e-5)


def test_the_answer_moves_with_a_groups_unidentified_offset(solved):
    rewards, ref, _ = solved
    moved = rewards.at[:, 0].add(1.0)
    one, two = (NOMINAL(r, ref, jnp.zeros_like(ref)) for r in (rewards, moved))
    assert jnp.abs(one.weight - two.weight).max(-1).mean() > 0.1


def test_a_nominal_reward_between_the_mean_and_the_worst_case(solved):
    """BRME: at share 1 the nominal optimum, at 0 max-min; in between the worst case in between."""
    rewards, ref, _ = solved
    nominal, kl_coef = rewards.mean(1), 0.3
    laws = [
        NOMINAL((1 - share) * rewards, ref, share * nominal).log_prob for share in (0.0, 0.5, 1.0)
    ]
    alone = jnp.exp(gibbs.log_prob(nominal, ref, kl_coef=kl_coef))
    np.testing.assert_allclose(jnp.exp(laws[2]), alone, atol=1e-5)
    worst = [jax.vmap(lambda p, r, q: objective(p, r, q, kl_coef))(p, rewards, ref) for p in laws]
    assert (worst[0] >= worst[1] - 1e-5).all()
    assert worst[0].mean() > worst[1].mean() > worst[2].mean()


@pytest.mark.slow
def test_multipliers_hold_the_thresholds_with_slackness(x64):
    rewards, ref = jax.vmap(world)(jax.random.split(jax.random.key(3), 16))
    kl_coef = 0.5
    free = gibbs.log_prob(rewards[:, 0], ref, kl_coef=kl_coef)
    value = jnp.einsum("sxa,smxa->sm", jnp.exp(free), rewards[:, 1:]) / 2
    # One threshold above what the nominal optimum gives, one below: bound and slack.
    threshold = value + jnp.array([[0.2, -0.2]])
    found = jax.vmap(
        lambda r, p, t: saddle.cone(r[1:], p, kl_coef=kl_coef, threshold=t, nominal=r[0])
    )(rewards, ref, threshold)
    reachable = rewards[:, 1].max(-1).mean(-1) > threshold[:, 0] + 0.2
    assert reachable.sum() > 8
    inside = found.violation[reachable]
    assert inside.max() < 1e-9
    assert found.duality_gap[reachable].max() < 1e-9
    np.testing.assert_array_less(-1e-12, found.weight[reachable])
    held = jax.vmap(
        lambda r, p, t: saddle.free(r[1:2], p, kl_coef=kl_coef, threshold=t, nominal=r[0])
    )(rewards, ref, threshold[:, :1])
    assert held.violation[reachable].max() < 1e-10
    # Where the second constraint is slack at the answer, the two are one problem.
    slack = reachable & (found.value[:, 1] > threshold[:, 1] + 1e-3)
    np.testing.assert_allclose(held.log_prob[slack], found.log_prob[slack], rtol=1e-5, atol=1e-5)
    # A threshold that no policy meets: the violation says so.
    never = saddle.cone(rewards[0, 1:], ref[0], kl_coef=0.5, threshold=jnp.array([99.0, 0.0]))
    assert never.violation > 90


def test_the_ball_is_a_norm_outside_the_expectation(x64):
    rewards, ref = world(jax.random.key(5))
    kl_coef = 0.3
    nominal = rewards.mean(0)
    found = saddle.ball(0.5 * rewards, ref, kl_coef=kl_coef, nominal=nominal)
    assert found.duality_gap < 1e-12

    def own(log_prob):
        mean = jnp.einsum("xa,mxa->m", jnp.exp(log_prob), 0.5 * rewards) / 2
        reward = (jnp.exp(log_prob) * nominal).sum(-1).mean()
        return (
            reward - jnp.sqrt(mean @ mean) - kl_coef * divergence.categorical(log_prob, ref).mean()
        )

    moved = jax.nn.log_softmax(
        found.log_prob[None] + 0.05 * jax.random.normal(jax.random.key(1), (300, *ref.shape))
    )
    assert (jax.vmap(own)(moved) <= own(found.log_prob) + 1e-12).all()


def test_the_sampled_steps_lead_to_the_saddle(x64):
    rewards, ref = world(jax.random.key(6))
    exact = saddle.simplex(rewards, ref, kl_coef=0.5)

    def step(weight, _):
        mixed = jnp.einsum("m,mxa->xa", weight, rewards)
        law = jnp.exp(gibbs.log_prob(mixed, ref, kl_coef=0.5))
        value = jnp.einsum("xa,mxa->m", law, rewards) / 2
        return saddle.simplex_step(weight, value, rate=0.5), weight

    _, path = jax.lax.scan(step, jnp.full(3, 1 / 3), None, length=2000)
    np.testing.assert_allclose(path[1000:].mean(0), exact.weight, atol=1e-3)


def test_min_norm_weights_are_the_shortest_combination_and_stop_at_any_pareto_point(x64):
    rng = np.random.default_rng(1)
    gradients = jnp.array(rng.normal(size=(4, 6)) + 1)
    weight = groups.min_norm(gradients)
    best = float(((weight @ gradients) ** 2).sum())
    others = rng.dirichlet(np.ones(4), 20_000) @ np.asarray(gradients)
    assert best <= (others**2).sum(-1).min() + 1e-9
    # It improves all of them: the inner product with each gradient is at least its square.
    assert (gradients @ (weight @ gradients) >= best - 1e-8).all()
    opposed = jnp.array([[1.0, 0.0], [-3.0, 0.0]])
    np.testing.assert_allclose(groups.min_norm(opposed), [0.75, 0.25], atol=1e-6)
