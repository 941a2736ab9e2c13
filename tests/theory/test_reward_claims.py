"""Claims about rewards on small exact worlds, those that held and those that did not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import aggregate, gibbs, links, measure, reshape, saddle

pytestmark = pytest.mark.usefixtures("x64")
KL_COEF = 0.3


def worlds(count=64, members=5, actions=8):
    keys = jax.random.split(jax.random.key(0))
    rewards = jax.random.normal(keys[0], (members, count, actions))
    return rewards, jax.nn.log_softmax(jax.random.normal(keys[1], (count, actions)))


@pytest.mark.slow
def test_the_mean_is_optimal_under_a_right_posterior_and_every_other_rule_loses():
    """Members are the posterior: the truth is one of them. J is linear in the reward."""
    rewards, ref = worlds()
    rewards = aggregate.centre(rewards, ref)

    def expected(proxy):
        law = gibbs.log_prob(proxy, ref, kl_coef=KL_COEF)
        each = jax.vmap(lambda r: gibbs.value(law, r, ref, kl_coef=KL_COEF))(rewards)
        return each.mean(0)

    best = expected(aggregate.mean(rewards))
    for proxy in (
        aggregate.minimum(rewards),
        -aggregate.minimum(-rewards),
        aggregate.entropic(rewards, temperature=1.0),
        aggregate.penalized(rewards, deviation=1.0),
        rewards[0],
    ):
        lost = best - expected(proxy)
        assert (lost > 0).all()
        assert lost.mean() > 0.01


def test_transforms_lose_with_an_exact_reward_and_gain_on_rare_hacks_until_the_hacks_are_all():
    """At equal KL. 5 % of actions are 6 better by proxy and 3 worse by gold."""
    count, actions = 40, 100
    gold = jax.random.normal(jax.random.key(1), (count, 1, actions))
    hacked = jnp.arange(actions) < actions // 20
    ref = jnp.full((count, 1, actions), -np.log(actions))
    proxy = gold + jnp.where(hacked, 6.0, 0.0).reshape(1, 1, -1)
    truth = gold - jnp.where(hacked, 3.0, 0.0).reshape(1, 1, -1)
    levels = jnp.array([0.5, 2.8])
    ceiling = lambda r: reshape.ceiling(  # noqa: E731
        r, reference=reshape.quantile(r, ref, level=0.8)
    )
    transforms = [lambda r: r, lambda r: reshape.win_rate(r, ref), ceiling]
    proxies = jnp.stack([f(r) for r in (gold, proxy) for f in transforms])
    worth = jnp.stack([gold] * 3 + [truth] * 3)
    curve = jax.jit(
        jax.vmap(jax.vmap(lambda p, g, q: measure.frontier(p, g, q, divergences=levels).gold),
                 in_axes=(0, 0, None))
    )  # fmt: skip
    found = curve(proxies, worth, ref)
    exact = found[1:3] - found[:1]
    hacks = found[4:6] - found[3:4]
    assert (exact < 0).all()
    stderr = hacks.std(1) / np.sqrt(count)
    gain = hacks.mean(1)
    assert gain[0, 0] > 4 * stderr[0, 0]
    assert gain[0, 1] < -4 * stderr[0, 1]
    assert (gain[1] > 4 * stderr[1]).all()


def test_scale_is_behaviour_so_a_starc_distance_of_0_bounds_no_gap_of_ours():
    rewards, ref = worlds()
    reward = rewards[0]
    starc = jax.vmap(lambda r, q, p: measure.starc(r[None], q[None], p[None]))
    assert starc(reward, 5 * reward, ref).max() < 1e-6
    gaps = [
        gibbs.gap(gibbs.log_prob(c * reward, ref, kl_coef=0.5), reward, ref, kl_coef=0.5).mean()
        for c in (0.25, 0.5, 1.0, 2.0, 5.0)
    ]
    assert gaps[2] < 1e-12
    assert gaps[0] > gaps[1] > 0.01
    assert gaps[4] > gaps[3] > 0.01


def test_soups_of_log_linear_policies_are_the_optimum_of_the_weighted_reward():
    """The control, a mixture of the probabilities, is worth less."""
    rewards, ref = worlds(members=2)
    weight = jnp.array([0.3, 0.7])
    laws = jax.vmap(lambda r: gibbs.log_prob(r, ref, kl_coef=KL_COEF))(rewards)
    soup = jax.nn.log_softmax(aggregate.linear(laws, weight))
    mixed = aggregate.linear(rewards, weight)
    best = gibbs.log_prob(mixed, ref, kl_coef=KL_COEF)
    np.testing.assert_allclose(soup, best, rtol=1e-10)
    blend = jnp.log(aggregate.linear(jnp.exp(laws), weight))
    assert (gibbs.gap(blend, mixed, ref, kl_coef=KL_COEF) > 1e-3).all()


def test_constraints_on_means_do_not_stop_hacks_and_a_ceiling_on_each_sample_does():
    """Two proxies, each with hacks of its own, held at a mean; the control has none."""
    count, actions = 24, 120
    gold = jax.random.normal(jax.random.key(2), (count, 1, actions))
    place = jnp.arange(actions)
    hacks = jnp.stack([place < 6, place >= actions - 6]).reshape(2, 1, actions)
    ref = jnp.full((1, actions), -np.log(actions))

    def gain(gold, hacked):
        bad = jnp.where(hacked, hacks, False)
        proxies = aggregate.centre(gold[None] + jnp.where(bad, 6.0, 0.0), ref)
        truth = gold - jnp.where(bad.any(0), 3.0, 0.0)
        held = saddle.free(proxies, ref, kl_coef=1.0, threshold=jnp.full(2, 1.0))
        spent = jnp.sum(jnp.exp(held.log_prob) * (held.log_prob - ref))
        capped = aggregate.linear(jnp.minimum(proxies, 1.0), jnp.ones(2))
        kl_coef = measure.at_divergence(capped, ref, divergence=spent)
        law = jnp.exp(gibbs.log_prob(capped, ref, kl_coef=kl_coef))
        return jnp.sum((law - jnp.exp(held.log_prob)) * truth), held.violation

    both = jax.jit(jax.vmap(jax.vmap(gain, in_axes=(0, None)), in_axes=(None, 0)))
    found, violation = both(gold, jnp.array([True, False]))
    assert violation[0].max() < 1e-8
    stderr = found.std(1) / np.sqrt(count)
    assert found[0].mean() > 4 * stderr[0]
    assert found[1].mean() < -4 * stderr[1]


def test_a_ratio_of_strong_to_weak_ranks_no_better_than_the_strong_policy_alone():
    """Not with a foreign base; with the strong one's own base it is the reward itself (control)."""
    rewards, ref = worlds(actions=40)
    reward, foreign = rewards[0], jax.nn.log_softmax(rewards[1])
    strong = gibbs.log_prob(reward, ref, kl_coef=1.0)

    def correlation(score):
        flat = lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)  # noqa: E731
        return (flat(score) * flat(reward)).mean(-1).mean()

    ratio = lambda weak: gibbs.implicit_reward(strong, weak, kl_coef=1.0)  # noqa: E731
    np.testing.assert_allclose(correlation(ratio(ref)), 1, rtol=1e-10)
    assert correlation(ratio(foreign)) < correlation(strong)


def test_the_win_rate_of_pi0_is_one_half_and_par_depends_on_pi0():
    rewards, ref = worlds()
    par = reshape.win_rate(rewards[0], ref)
    np.testing.assert_allclose((jnp.exp(ref) * par).sum(-1), 0.5, rtol=1e-10)
    other = links.win_rate(links.matrix(rewards[0]), jnp.flip(ref, -1))
    assert jnp.abs(par - other).max() > 0.05


def test_the_front_at_a_kl_is_strictly_concave_and_without_one_it_is_a_few_corners():
    """Of two objectives: under a KL a weighted sum reaches every trade-off; without, it jumps."""
    rewards, ref = worlds(count=16, members=2)
    weights = jnp.linspace(0.02, 0.98, 25)

    def point(weight, rewards, ref, spent):
        mixed = weight * rewards[0] + (1 - weight) * rewards[1]
        kl_coef = measure.at_divergence(mixed, ref, divergence=spent)
        kl_coef = jnp.where(jnp.isfinite(spent), kl_coef, 1e-6)
        return jnp.exp(gibbs.log_prob(mixed, ref, kl_coef=kl_coef)) @ rewards.T

    over = jax.vmap(jax.vmap(point, in_axes=(0, None, None, None)), in_axes=(None, 1, 0, None))
    front = jax.jit(over)
    curve = front(weights, rewards, ref, jnp.asarray(0.3))  # [worlds, weights, objectives]
    step = jnp.diff(curve, axis=1)
    turn = step[:, :-1, 0] * step[:, 1:, 1] - step[:, :-1, 1] * step[:, 1:, 0]
    assert (turn < 0).all()  # each step is to the right of the one before
    assert (step[..., 0] > 0).all()
    assert (step[..., 1] < 0).all()
    corners = front(weights, rewards, ref, jnp.asarray(jnp.inf))
    different = [len(np.unique(np.round(world, 6), axis=0)) for world in corners]
    assert max(different) <= 8
    assert len(np.unique(np.round(curve[0], 6), axis=0)) == 25
    # Nothing of the same KL lies beyond it: mixtures of its own policies do not, nor others.
    moved = jax.nn.log_softmax(ref[None] + jax.random.normal(jax.random.key(1), (300, *ref.shape)))
    spent = (jnp.exp(moved) * (moved - ref[None])).sum(-1)
    value = jnp.einsum("nsa,msa->nsm", jnp.exp(moved), rewards)
    w = jnp.stack([weights, 1 - weights])
    best = jnp.einsum("swm,mw->sw", curve, w)
    others = jnp.einsum("nsm,mw->nsw", value, w)
    assert (jnp.where(spent[..., None] <= 0.3, others, -jnp.inf) <= best[None] + 1e-9).all()
    assert (spent <= 0.3).mean() > 0.1
