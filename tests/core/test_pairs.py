"""Every rule against brute force, under masks; ties uniform by key; one contract for all rules."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_klrlhf.core import ellipsoid, pairs

RESPONSES, DIM = 5, 3
RNG = np.random.default_rng(28)
PHI = RNG.normal(size=(RESPONSES, DIM))
STATE = ellipsoid.update(ellipsoid.init(DIM, ridge=0.5), jnp.array(RNG.normal(size=(8, DIM)), "f4"))
INVERSE = np.linalg.inv(np.asarray(STATE.precision, "float64"))
MAIN = np.array([0.4, 0.1, -0.3])


def rules(phi, main):
    """Each rule as the value that an experiment is handed."""
    return {
        "best_worst": pairs.best_worst,
        "best_second": pairs.best_second,
        "sampled": pairs.sampled,
        "most_uncertain": functools.partial(pairs.most_uncertain, features=phi, ellipsoid=STATE),
        "uncertain_against": functools.partial(
            pairs.uncertain_against, features=phi, ellipsoid=STATE, main=main
        ),
    }


@jax.jit
def choose(key, reward, where, phi):
    main = jnp.broadcast_to(jnp.array(MAIN, "float32"), (*reward.shape[:-1], DIM))
    return {name: rule(key, reward, where=where) for name, rule in rules(phi, main).items()}


def brute_force(name, reward, keep, phi):
    """All pairs (first, second) that the rule may return."""
    kept = np.flatnonzero(keep)
    both = list(itertools.permutations(kept, 2))
    width = lambda v: np.sqrt(v @ INVERSE @ v)  # noqa: E731
    score = {
        "best_worst": lambda i, j: (reward[i], -reward[j]),
        "best_second": lambda i, j: (reward[i], reward[j]),
        "sampled": lambda i, j: (0,),
        "most_uncertain": lambda i, j: (width(phi[i] - phi[j]),),
        "uncertain_against": lambda i, j: (width(phi[j] - MAIN),),
    }[name]
    scores = [score(i, j) for i, j in both]
    best = max(scores, default=None)
    return {pair for pair, s in zip(both, scores, strict=True) if np.allclose(s, best, rtol=1e-6)}


@given(
    st.lists(st.booleans(), min_size=RESPONSES, max_size=RESPONSES),
    st.lists(st.integers(-2, 2), min_size=RESPONSES, max_size=RESPONSES),
    st.integers(0, 2**31 - 1),
)
def test_rules_equal_brute_force(mask, rewards, seed):
    """Ties occur (small integers); NaN stands behind the mask, in rewards and features."""
    keep, reward = np.array(mask), np.array(rewards, float)
    dirty = jnp.array(np.where(keep, reward, np.nan), "float32")
    phi = jnp.array(np.where(keep[:, None], PHI, np.nan), "float32")
    found = choose(jax.random.key(seed), dirty, jnp.array(keep), phi)
    for name, pair in found.items():
        assert pair.valid == (keep.sum() >= 2), name
        chosen = (int(pair.first), int(pair.second))
        if pair.valid:
            assert chosen in brute_force(name, reward, keep, PHI), name
        else:
            assert chosen == (0, 0), name


def test_ties_are_broken_uniformly():
    """4000 rows of equal rewards and four corners of equal width: chi-square over ordered pairs.

    20 (or 8) equally likely pairs; the limit is the 1 - 1e-7 quantile of chi-square with 19 degrees
    of freedom, 68.6, and so is the false-alarm rate of each of the four statistics at most 1e-7.
    """
    rows, limit = 4000, 68.6
    reward = jnp.zeros((rows, RESPONSES))
    where = jnp.ones(reward.shape, bool)
    # One corner of a square is doubled, and all widths are those of the identity.
    corners = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    corners = jnp.concatenate([corners, corners[:1]])
    key = jax.random.key(4)
    uncertain = pairs.most_uncertain(
        key,
        reward,
        features=jnp.broadcast_to(corners, (rows, RESPONSES, DIM)),
        ellipsoid=ellipsoid.init(DIM, ridge=1.0),
        where=where,
    )
    found = {
        "best_worst": pairs.best_worst(key, reward),
        "best_second": pairs.best_second(key, reward),
        "sampled": pairs.sampled(key, reward),
        "most_uncertain": uncertain,
    }
    for name, pair in found.items():
        counts = np.zeros((RESPONSES, RESPONSES))
        np.add.at(counts, (np.asarray(pair.first), np.asarray(pair.second)), 1)
        allowed = ~np.eye(RESPONSES, dtype=bool)
        if name == "most_uncertain":  # diameters only: 0-2, 2-4 (the double of 0) and 1-3
            allowed[:] = False
            for i, j in [(0, 2), (2, 4), (1, 3)]:
                allowed[i, j] = allowed[j, i] = True
        assert counts[~allowed].sum() == 0, name
        expected = rows / allowed.sum()
        assert ((counts[allowed] - expected) ** 2 / expected).sum() < limit, name


def test_one_response_and_all_masked():
    key, one = jax.random.key(0), jnp.ones((8, 1))
    nothing = jnp.zeros((8, RESPONSES), bool)
    found = [
        choose(key, one, jnp.ones((8, 1), bool), jnp.ones((8, 1, DIM))),
        choose(key, jnp.ones((8, RESPONSES)), nothing, jnp.ones((8, RESPONSES, DIM))),
    ]
    for chosen in found:
        for name, pair in chosen.items():
            assert not pair.valid.any(), name
            assert not jnp.any(pair.first | pair.second), name
    assert pairs.tournament(key, one).first.shape == (8, 0)


def test_identical_responses():
    """Equal features are worth no comparison; rules that read rewards still give two indices."""
    phi = jnp.broadcast_to(jnp.array(PHI[0], "float32"), (RESPONSES, DIM))
    reward = jnp.full(RESPONSES, 0.3)
    found = choose(jax.random.key(5), reward, jnp.ones(RESPONSES, bool), phi)
    assert not found["most_uncertain"].valid
    for name in ("best_worst", "best_second", "sampled", "uncertain_against"):
        assert found[name].valid
        assert found[name].first != found[name].second
    rows = jnp.array([[[1, 2], [1, 2], [3, 0], [1, 2]], [[0, 0], [1, 0], [0, 1], [1, 1]]])
    assert pairs.distinct(rows).tolist() == [[True, False, True, False], [True] * 4]
    best = pairs.best_second(
        jax.random.key(6), jnp.array([2.0, 2.0, 1.0, 2.0]), where=pairs.distinct(rows)[0]
    )
    assert (int(best.first), int(best.second)) == (0, 2)


def test_extreme_rewards():
    """Differences beyond float32, infinities, NaN as a kept reward (which counts as masked)."""
    key = jax.random.key(7)
    pair = pairs.best_worst(key, jnp.array([1e38, -1e38, 0.0, jnp.nan]))
    assert (int(pair.first), int(pair.second)) == (0, 1)
    pair = pairs.best_worst(key, jnp.array([-jnp.inf, 1.0, jnp.inf]))
    assert (int(pair.first), int(pair.second)) == (2, 0)
    assert not pairs.best_worst(key, jnp.array([1.0, jnp.nan])).valid


@functools.partial(jax.jit, static_argnames="rule")
def knock_out(key, reward, where, *, rule):
    return rule(key, reward, decide=lambda key, margin: margin > 0, where=where)


@given(st.sampled_from([1, 4, 7]), st.integers(0, 2**7 - 1), st.integers(0, 2**31 - 1))
def test_tournament_is_a_knock_out(responses, bits, seed):
    """Each valid match knocks one kept response out; one is left, the best if the better one wins.

    First-round matches are disjoint and are the tournament's first ones.
    """
    keep = np.array([bits >> i & 1 for i in range(responses)], bool)
    reward = np.random.default_rng(seed).permutation(responses).astype("float32")
    dirty, where = jnp.array(np.where(keep, reward, np.nan)), jnp.array(keep)
    key = jax.random.key(seed)
    found = knock_out(key, dirty, where, rule=pairs.tournament)
    first = knock_out(key, dirty, where, rule=pairs.first_round)
    assert found.valid.shape == (responses - 1,)
    found, first = jax.device_get((found, first))
    assert found.valid.sum() == max(keep.sum() - 1, 0)
    assert first.valid.sum() == keep.sum() // 2
    for whole, part in zip(found, first, strict=True):
        assert np.array_equal(whole[: responses // 2], part)
    assert len({*first.first[first.valid].tolist(), *first.second[first.valid].tolist()}) == 2 * (
        keep.sum() // 2
    )
    out = set()
    for winner, loser, valid in zip(*map(np.asarray, found), strict=True):
        if valid:
            assert keep[winner]
            assert keep[loser]
            assert reward[winner] > reward[loser]
            assert not out & {int(winner), int(loser)}
            out.add(int(loser))
    if keep.any():
        assert set(np.flatnonzero(keep)) - out == {np.where(keep, reward, -1).argmax()}


def test_tournament_is_judged_by_bradley_terry():
    """Two responses, margin 1: the better one wins with probability sigma(1).

    20 000 matches, 5.5 standard errors: false-alarm rate 4e-8.
    """
    reward = jnp.broadcast_to(jnp.array([1.0, 0.0])[None], (20_000, 2))
    found = pairs.tournament(jax.random.key(8), reward)
    share = float(jnp.mean(found.first[:, 0] == 0))
    expected = 1 / (1 + np.exp(-1))
    assert abs(share - expected) < 5.5 * np.sqrt(expected * (1 - expected) / 20_000)


def test_the_higher_reward_is_preferred_and_a_coin_decides_between_equal_ones():
    """20 000 ties, 5.5 standard errors: false-alarm rate 4e-8."""
    margin = jnp.array([-jnp.inf, -1e-30, 1e-30, jnp.inf], "float32")
    assert pairs.higher(jax.random.key(10), margin).tolist() == [False, False, True, True]
    share = float(jnp.mean(pairs.higher(jax.random.key(11), jnp.zeros(20_000))))
    assert abs(share - 0.5) < 5.5 * 0.5 / np.sqrt(20_000)


def test_batches_shards_and_permutations():
    """Rows are independent; eight devices choose the same; the choice follows a permutation."""
    reward = jnp.array(RNG.normal(size=(8, RESPONSES)), "float32")
    where = jnp.array(RNG.random((8, RESPONSES)) < 0.8)
    phi = jnp.array(RNG.normal(size=(8, RESPONSES, DIM)), "float32")
    key = jax.random.key(9)
    plain = choose(key, reward, where, phi)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = choose(key, *(jax.device_put(a, rows) for a in (reward, where, phi)))
    order = RNG.permutation(RESPONSES)
    turned = choose(key, reward[:, order], where[:, order], phi[:, order])
    for name, pair in plain.items():
        assert all(map(np.array_equal, pair, sharded[name])), name
        if name in ("best_worst", "best_second"):  # no ties here, so no key enters
            assert np.array_equal(order[turned[name].first][pair.valid], pair.first[pair.valid])
    mapped = jax.vmap(lambda k, r, w: pairs.best_worst(k, r, where=w))(
        jax.random.split(key, 8), reward, where
    )
    assert np.array_equal(mapped.first, plain["best_worst"].first)


def test_no_responses():
    with pytest.raises(ValueError, match="at least one response"):
        pairs.best_worst(jax.random.key(0), jnp.zeros((3, 0)))
