"""Acceptance, its flags and masks, the schedule, and the exact laws against enumeration."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_klrlhf.core import choices, gibbs, rejection

ACTIONS = 5
RNG = np.random.default_rng(26)
REWARD = np.array([0.3, -1.0, 0.9, 0.3, 0.0])
LOG_PI0 = scipy.special.log_softmax(RNG.normal(size=ACTIONS))

accept = jax.jit(rejection.accept)


def test_log_probability_and_flags(x64):
    reward = jnp.array(np.stack([REWARD, REWARD + 0.5]))
    key = jax.random.key(0)
    out = accept(key, reward, reward_bound=1.0, kl_coef=0.5, kl_coef_prev=2.0)
    expected = (1 / 0.5 - 1 / 2.0) * np.minimum(np.asarray(reward) - 1.0, 0)
    np.testing.assert_allclose(out.log_prob, expected, atol=1e-15)
    assert out.exact.tolist() == [True, False]  # the second row reaches 1.4
    assert out.bound_violated.tolist() == [False, True]
    assert out.accepted[1, 2]
    per_row = accept(key, reward, reward_bound=jnp.array([0.9, 1.4]), kl_coef=0.5)
    assert per_row.exact.all()
    np.testing.assert_allclose(per_row.log_prob, np.stack([REWARD - 0.9] * 2) * 2, atol=1e-15)
    unknown = accept(key, reward, reward_bound=None, kl_coef=0.5)
    np.testing.assert_allclose(unknown.log_prob, per_row.log_prob, atol=1e-15)
    assert not unknown.exact.any()
    assert not unknown.bound_violated.any()


@given(st.lists(st.booleans(), min_size=ACTIONS, max_size=ACTIONS), st.booleans())
def test_masked_draws_are_deleted(mask, known):
    """NaN and huge rewards behind the mask touch neither the bound nor the flags."""
    keep = np.array(mask)
    poison = np.where(np.arange(ACTIONS) % 2 == 0, np.nan, 1e9)
    reward = jnp.array(np.where(keep, REWARD, poison), "float32")
    bound = jnp.float32(0.9) if known else None
    out = accept(jax.random.key(1), reward, reward_bound=bound, kl_coef=0.5, where=jnp.array(keep))
    assert not (np.asarray(out.accepted) & ~keep).any()
    assert np.all(np.asarray(out.log_prob)[~keep] == -np.inf)
    top = 0.9 if known else REWARD[keep].max(initial=-np.inf)
    np.testing.assert_allclose(out.log_prob[keep], (REWARD[keep] - top) / 0.5, atol=1e-5)
    assert not out.bound_violated
    assert out.exact == known
    if keep.any() and not known:  # the best kept draw is always accepted
        assert out.accepted[np.where(keep, REWARD, -np.inf).argmax()]


@pytest.mark.parametrize("kl_coef", [1e-4, 1e4])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extremes(kl_coef, scale):
    """Only the maximum survives a tiny kl_coef; with a huge one the probability is near 1."""
    reward = jnp.array(REWARD * scale, "float32")
    out = accept(jax.random.key(2), reward, reward_bound=0.9 * scale, kl_coef=kl_coef)
    assert jnp.all(out.log_prob <= 0)
    assert jnp.all(jnp.isfinite(out.log_prob))
    if kl_coef < 1:
        assert out.accepted.tolist() == [False, False, True, False, False]
    one = accept(jax.random.key(2), jnp.array([3.0]), reward_bound=None, kl_coef=kl_coef)
    assert one.accepted.all()
    same = accept(jax.random.key(2), jnp.full(5, scale), reward_bound=scale, kl_coef=kl_coef)
    assert same.accepted.all()


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.sampled_from([1, 3, 6]))
def test_take(accepted, k):
    taken = rejection.take(jnp.array([accepted, [True] * len(accepted)]), k)
    first = [i for i, yes in enumerate(accepted) if yes][:k]
    assert taken.indices[0].tolist() == first + [0] * (k - len(first))
    assert taken.valid[0].tolist() == [i < len(first) for i in range(k)]
    assert taken.indices[1].tolist() == list(range(k))
    assert taken.valid[1].all()


@pytest.mark.parametrize("start", [math.inf, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_schedule(x64, start, steps):
    etas = rejection.schedule(0.3, steps, start=start)
    assert etas.shape == (steps,)
    assert etas[-1] == 0.3
    inverse = np.concatenate([[1 / start], 1 / np.asarray(etas)])
    np.testing.assert_allclose(np.diff(inverse), (1 / 0.3 - 1 / start) / steps, rtol=1e-12)


def test_exact_laws_by_enumeration(x64):
    reward, log_pi0 = jnp.array(REWARD), jnp.array(LOG_PI0)
    p = np.exp(LOG_PI0)
    options = {"kl_coef": 0.5, "kl_coef_prev": 2.0}
    share = np.exp(1.5 * np.minimum(REWARD - 0.4, 0))
    rate = rejection.acceptance_rate(reward, log_pi0, reward_bound=0.4, **options)
    np.testing.assert_allclose(rate, p @ share, rtol=1e-13)
    law = rejection.accepted_log_prob(reward, log_pi0, reward_bound=0.4, **options)
    np.testing.assert_allclose(jnp.exp(law), p * share / (p @ share), rtol=1e-13)
    # With a true bound the law is Gibbs', whatever the slack; the rate pays for the slack.
    for bound in (0.9, 2.0):
        exact = rejection.accepted_log_prob(reward, log_pi0, reward_bound=bound, kl_coef=0.5)
        np.testing.assert_allclose(exact, gibbs.log_prob(reward, log_pi0, kl_coef=0.5), atol=1e-13)
    # Its own rate times the partition function: E exp((r - b) / eta) = exp(J* / eta - b / eta).
    free = gibbs.free_energy(reward, log_pi0, kl_coef=0.5)
    np.testing.assert_allclose(
        rejection.acceptance_rate(reward, log_pi0, reward_bound=0.9, kl_coef=0.5),
        math.exp((float(free) - 0.9) / 0.5),
        rtol=1e-12,
    )


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_law_under_the_batch_maximum(x64, samples):
    """Every one of the A^n batches enumerated, with a tie in the rewards and a masked action."""
    keep = np.array([True, True, True, True, False])
    p = np.where(keep, np.exp(LOG_PI0), 0)
    p /= p.sum()
    counts = np.zeros(ACTIONS)
    for batch in itertools.product(np.flatnonzero(keep), repeat=samples):
        top = REWARD[list(batch)].max()
        for a in batch:
            counts[a] += p[list(batch)].prod() * math.exp((REWARD[a] - top) / 0.5)
    law = rejection.batch_maximum_log_prob(
        jnp.array(np.where(keep, REWARD, np.nan)),
        jnp.array(LOG_PI0),
        samples=samples,
        kl_coef=0.5,
        where=jnp.array(keep),
    )
    np.testing.assert_allclose(jnp.exp(law), counts / counts.sum(), atol=1e-13)


def test_batch_maximum_tends_to_the_target(x64):
    """Its distance from Gibbs falls in n, from that of the proposal itself (n = 1) to 0.

    The weight E exp(c (r_max - max(r, M))) is 1 unless the n - 1 others miss the best action, of
    probability p, and at most exp(c (r_max - r_min)) then: so TV <= (1 - p)^(n - 1) exp(c range).
    """
    reward, log_pi0 = jnp.array(np.stack([REWARD, -REWARD])), jnp.array(np.stack([LOG_PI0] * 2))
    target = np.exp(gibbs.log_prob(reward, log_pi0, kl_coef=0.5))
    distance = []
    for samples in (1, 2, 8, 64, 4096):
        law = rejection.batch_maximum_log_prob(reward, log_pi0, samples=samples, kl_coef=0.5)
        distance.append(0.5 * np.abs(np.exp(law) - target).sum(axis=-1))
    distance = np.array(distance)
    start = 0.5 * np.abs(np.exp(log_pi0) - target).sum(axis=-1)
    np.testing.assert_allclose(distance[0], start, rtol=1e-12)
    assert np.all(np.diff(distance, axis=0) < 0)
    assert np.all(distance[1] > 0.02)
    best = np.exp(LOG_PI0)[[REWARD.argmax(), REWARD.argmin()]]
    limit = (1 - best) ** np.array([[0], [1], [7], [63], [4095]]) * np.exp(np.ptp(REWARD) / 0.5)
    assert np.all(distance < limit + 1e-15)


def test_vmap_and_eight_devices_draw_the_same():
    reward = jnp.array(RNG.normal(size=(8, 16)), "float32")
    key = jax.random.key(3)
    plain = rejection.accept(key, reward, reward_bound=None, kl_coef=0.5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.device_put(reward, NamedSharding(mesh, PartitionSpec("data")))
    sharded = accept(key, rows, reward_bound=None, kl_coef=0.5)
    assert np.array_equal(plain.accepted, sharded.accepted)
    keys = jax.random.split(key, 8)
    mapped = jax.vmap(lambda k, r: rejection.accept(k, r, reward_bound=None, kl_coef=0.5))(
        keys, reward
    )
    alone = rejection.accept(keys[5], reward[5], reward_bound=None, kl_coef=0.5)
    assert np.array_equal(mapped.accepted[5], alone.accepted)


def test_gradient_of_the_rate_under_a_mask(x64):
    """d log rate / d reward = c (accepted law) where nothing is clipped; 0 behind the mask."""
    where = jnp.array([True, True, False, True, True])
    log_pi0 = jnp.array(LOG_PI0)

    def log_rate(reward):
        options = {"reward_bound": 2.0, "kl_coef": 0.5, "where": where}
        return jnp.log(rejection.acceptance_rate(reward, log_pi0, **options))

    reward = jnp.where(where, jnp.array(REWARD), jnp.nan)
    law = rejection.accepted_log_prob(reward, log_pi0, reward_bound=2.0, kl_coef=0.5, where=where)
    np.testing.assert_allclose(jax.grad(log_rate)(reward), 2.0 * jnp.exp(law), atol=1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rejection.schedule(0.5, 0), "steps must be at least 1"),
        (lambda: rejection.schedule(0.5, 2, start=0.1), "kl_coef falls"),
        (lambda: rejection.take(jnp.ones(3, bool), 4), "k must be in 1..3"),
        (lambda: rejection.schedule(0.0, 2), "kl_coef must be > 0"),
        (
            lambda: rejection.accept(
                jax.random.key(0), jnp.zeros(2), reward_bound=0.0, kl_coef=1.0, kl_coef_prev=0.5
            ),
            "kl_coef falls",
        ),
        (
            lambda: rejection.batch_maximum_log_prob(
                jnp.zeros(2), jnp.zeros(2), samples=0, kl_coef=1.0
            ),
            "samples must be at least 1",
        ),
    ],
)
def test_wrong_facts(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_batch_maximums_law_holds_in_float32_over_thousands_of_actions():
    """A running sum of thousands of float32 masses is not monotone; the law must not notice."""
    key_reward, key_mass = jax.random.split(jax.random.key(0))
    reward = np.asarray(jax.random.normal(key_reward, (4, 5000)))
    log_prob = np.asarray(jax.nn.log_softmax(3 * jax.random.normal(key_mass, reward.shape)))
    single = rejection.batch_maximum_log_prob(
        jnp.asarray(reward), jnp.asarray(log_prob), samples=8, kl_coef=0.5
    )
    with jax.enable_x64(True):
        double = rejection.batch_maximum_log_prob(
            jnp.asarray(reward, jnp.float64),
            jnp.asarray(log_prob, jnp.float64),
            samples=8,
            kl_coef=0.5,
        )
    # Total variation: 5000 masses, each off by some roundings of the running sum (6e-8).
    distance = 0.5 * np.abs(np.exp(np.asarray(single, np.float64)) - np.exp(double)).sum(-1)
    assert (distance < 5000 * 6e-8).all()


def test_the_resolution_of_a_uniform_draw_is_the_one_that_is_stated():
    """Multiples of 2^-23, odd ones among them: not of 2^-22, and none between as at 2^-24."""
    draws = np.asarray(jax.random.uniform(jax.random.key(0), (4096,)), np.float64) * 2**23
    assert (draws == np.round(draws)).all()
    assert (draws % 2 == 1).any()
    assert "2^-23" in rejection.__doc__


def test_until_is_the_papers_code_pass_by_pass():
    """The law of which two of four are accepted, by the code of RSO's appendix run out exactly.

    20,000 rows, six sets: 36.5 is the 1 - 1e-6 quantile of chi-squared with 5 degrees of freedom.
    """
    reward, eta = np.array([0.3, 1.0, -0.2, 0.9]), 0.7

    def passes(left, taken):
        """Probability of every final set, from a state between two passes."""
        if len(taken) == 2:
            return {frozenset(taken): 1.0}
        top, states = max(reward[i] for i in left), {(): 1.0}
        for i in left:
            p, after = np.exp((reward[i] - top) / eta), {}
            for got, mass in states.items():
                full = len(taken) + len(got) == 2
                for new, q in ((got, 1.0),) if full else (((*got, i), p), (got, 1 - p)):
                    after[new] = after.get(new, 0.0) + mass * q
            states = after
        law = {}
        for got, mass in ((got, mass) for got, mass in states.items() if mass):
            rest = [i for i in left if i not in got]
            for final, q in passes(rest, taken + list(got)).items():
                law[final] = law.get(final, 0.0) + mass * q
        return law

    law = passes(list(range(4)), [])
    rows = 20_000
    found = np.asarray(
        rejection.until(
            jax.random.key(2),
            jnp.broadcast_to(jnp.array(reward, "float32"), (rows, 4)),
            count=2,
            kl_coef=eta,
        )
    )
    assert (found.sum(1) == 2).all()
    assert abs(sum(law.values()) - 1) < 1e-12
    statistic = 0.0
    for pair, p in law.items():
        hits = found[:, sorted(pair)].all(1).sum()
        statistic += (hits - rows * p) ** 2 / (rows * p)
    assert statistic < 36.5
    where = jnp.array([[True, False, False, False]])
    one = rejection.until(jax.random.key(0), jnp.zeros((1, 4)), count=3, kl_coef=1.0, where=where)
    assert one.tolist() == where.tolist()


def test_acceptance_of_a_choice_set_is_of_its_draws_and_of_its_law():
    every = choices.enumerated(
        jnp.log(jnp.array([0.5, 0.3, 0.2])), reward=jnp.array([0.0, 0.6, 1.0])
    )
    listed = rejection.accepted_choices(jax.random.key(0), every, reward_bound=1.0, kl_coef=0.5)
    tilted = np.array([0.5, 0.3, 0.2]) * np.exp(np.array([0.0, 0.6, 1.0]) / 0.5)
    np.testing.assert_allclose(listed.mass, tilted / tilted.sum(), rtol=1e-5)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (20_000, 3)), every)
    drawn = choices.sample(jax.random.key(1), rows, 4)
    left = rejection.accepted_choices(jax.random.key(2), drawn, reward_bound=1.0, kl_coef=0.5)
    # The mass of a choice over that of all accepted draws: pooled over rows it is the target.
    accepted = np.asarray(jnp.exp(left.log_mass)) * np.asarray(left.where)
    some = np.asarray(left.where).any(1)
    np.testing.assert_allclose(accepted[some].sum(1), 1, rtol=1e-5)
    # A choice is there unless none of 4 draws is it and accepted: 5 standard errors, 6e-7 each.
    for action in range(3):
        p = (np.array([0.5, 0.3, 0.2]) * np.exp((np.array([0.0, 0.6, 1.0]) - 1) / 0.5))[action]
        there = ((np.asarray(left.number) == action) & np.asarray(left.where)).any(1).mean()
        want = 1 - (1 - p) ** 4
        assert abs(there - want) < 5 * np.sqrt(want * (1 - want) / 20_000)
    # What an earlier step left out stays out, whatever its chance now.
    once = choices.drawn(
        jnp.array([[0], [1], [0]]), where=jnp.array([True, False, True]), reward=jnp.ones(3)
    )
    again = rejection.accepted_choices(jax.random.key(0), once, reward_bound=1.0, kl_coef=0.5)
    assert again.where.tolist() == [True, False, False]
    assert again.mass.tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="needs reward_bound="):
        rejection.accepted_choices(jax.random.key(0), every, kl_coef=0.5)
    three = rejection.accepted_choices(jax.random.key(0), drawn, kl_coef=0.5, count=2)
    assert (np.asarray(three.where).sum(1) == np.minimum(np.asarray(drawn.where).sum(1), 2)).all()
