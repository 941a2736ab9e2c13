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

from jax_klrlhf.core import choices as choice_sets
from jax_klrlhf.core import ellipsoid, pairs
from jax_klrlhf.core.choices import Choices

RESPONSES, DIM = 5, 3
RNG = np.random.default_rng(28)
PHI = RNG.normal(size=(RESPONSES, DIM))
STATE = ellipsoid.update(ellipsoid.init(DIM, ridge=0.5), jnp.array(RNG.normal(size=(8, DIM)), "f4"))
INVERSE = np.linalg.inv(np.asarray(STATE.precision, "float64"))
RULES = {
    "best_worst": pairs.best_worst,
    "best_second": pairs.best_second,
    "best_random": pairs.best_random,
    "sampled": pairs.sampled,
    "most_uncertain": pairs.most_uncertain,
    "widest": functools.partial(pairs.most_uncertain, curvature=jnp.ones_like),
    "uncertain_against": pairs.uncertain_against,
}
RANKING = ("best_worst", "best_second", "best_random")


def choice_set(reward, where=None, phi=None, state=STATE):
    """Equally likely choices."""
    where = jnp.ones(reward.shape, bool) if where is None else where
    mass = jnp.where(where, 0.0, -jnp.inf)
    return Choices(where, mass, reward=reward, features=phi, ellipsoid=state)


@jax.jit
def choose(key, reward, where, phi):
    given = choice_set(reward, where, phi)
    return {name: rule(key, given) for name, rule in RULES.items()}


def brute_force(name, reward, keep, phi):
    """All pairs (first, second) that the rule may return."""
    kept = np.flatnonzero(keep)
    both = list(itertools.permutations(kept, 2))
    width = lambda v: np.sqrt(v @ INVERSE @ v)  # noqa: E731
    main = phi[kept].mean(0) if len(kept) else 0.0
    curvature = lambda m: 1 / (2 + np.exp(m) + np.exp(-m))  # noqa: E731
    score = {
        "best_worst": lambda i, j: (reward[i], -reward[j]),
        "best_second": lambda i, j: (reward[i], reward[j]),
        "best_random": lambda i, j: (reward[i],),
        "sampled": lambda i, j: (0,),
        "most_uncertain": lambda i, j: (
            curvature(reward[i] - reward[j]) * width(phi[i] - phi[j]) ** 2,
        ),
        "widest": lambda i, j: (width(phi[i] - phi[j]),),
        "uncertain_against": lambda i, j: (width(phi[j] - main),),
    }[name]
    scores = [score(i, j) for i, j in both]
    best = max(scores, default=(0,))
    return {pair for pair, s in zip(both, scores, strict=True) if np.allclose(s, best, rtol=1e-5)}


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
        chosen = (int(pair.first), int(pair.second))
        allowed = brute_force(name, reward, keep, PHI)
        if name in RANKING:  # what it ranks equal is no pair
            assert pair.valid == (bool(pair.valid) and reward[chosen[0]] != reward[chosen[1]]), name
            decided = {(i, j) for i, j in allowed if reward[i] != reward[j]}
            assert pair.valid or decided != allowed or not allowed, name
            assert not pair.valid or decided, name
        else:
            assert pair.valid == (keep.sum() >= 2), name
        assert chosen in allowed if pair.valid else chosen == (0, 0), name


def test_ties_are_broken_uniformly():
    """4000 rows with two best, two worst, and four corners of equal width: chi-square over pairs.

    Up to 20 equally likely ordered pairs; the limit is the 1 - 1e-7 quantile of chi-square with 19
    degrees of freedom, 68.6, and so is the false-alarm rate of each of the statistics at most 1e-7.
    """
    rows, limit = 4000, 68.6
    reward = jnp.broadcast_to(jnp.array([1.0, -1.0, 1.0, -1.0, 0.0]), (rows, RESPONSES))
    # One corner of a square is doubled, and all widths are those of the identity.
    corners = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    corners = jnp.broadcast_to(jnp.concatenate([corners, corners[:1]]), (rows, RESPONSES, DIM))
    given = choice_set(reward, None, corners, ellipsoid.init(DIM, ridge=1.0))
    everyone = [(i, j) for i in range(5) for j in range(5) if i != j]
    diameters = [(0, 2), (2, 0), (2, 4), (4, 2), (1, 3), (3, 1)]
    allowed = {
        "best_worst": [(i, j) for i in (0, 2) for j in (1, 3)],
        "best_random": [(i, j) for i in (0, 2) for j in (1, 3, 4)],
        "sampled": everyone,
        "widest": diameters,
    }
    for name, possible in allowed.items():
        pair = RULES[name](jax.random.key(4), given)
        counts = np.zeros((RESPONSES, RESPONSES))
        np.add.at(counts, (np.asarray(pair.first), np.asarray(pair.second)), 1)
        valid = int(pair.valid.sum())
        counts[0, 0] -= rows - valid  # ties are invalid
        hits = np.array([counts[i, j] for i, j in possible])
        assert hits.sum() == valid == counts.sum(), name
        expected = valid / len(possible)
        assert ((hits - expected) ** 2 / expected).sum() < limit, name
        # The best one's other half is tied with it at one of four others.
        assert valid == rows or (name == "best_random" and abs(valid / rows - 0.75) < 0.04)
    second = pairs.best_second(jax.random.key(4), given)
    assert not second.valid.any()  # its two best are equal


def test_a_key_is_used_once():
    """Every draw inside a rule has a key of its own; all rules, with JAX's own checker."""

    def careless(key, choices):
        return [rule(key, choices) for rule in (pairs.sampled, pairs.sampled)]

    given = choice_set(jnp.array([0.3, 0.1, 0.2, 0.0, 0.5]), None, jnp.array(PHI, "float32"))
    several = {**RULES, "first_round": pairs.first_round, "tournament": pairs.tournament}
    several["fallback"] = pairs.otherwise(pairs.best_worst, pairs.sampled)
    several["careless"] = careless
    reused = []
    with jax.debug_key_reuse(True):
        for name, rule in several.items():
            try:
                jax.jit(rule)(jax.random.key(1), given)
            except jax.errors.KeyReuseError:
                reused.append(name)
    assert reused == ["careless"]


def test_the_orders_of_a_bracket_and_its_matches_are_independent():
    """Mutant: without its random order neighbours always meet. Six pairs meet equally often.

    25.7 is the 1 - 1e-4 quantile of chi-square with 5 degrees of freedom; 6000 rows.
    """
    given = choice_set(jnp.zeros((6000, 4)))
    found = pairs.first_round(jax.random.key(3), given)
    first = jnp.where(found.first < found.second, found.first, found.second)
    second = jnp.maximum(found.first, found.second)
    met = np.zeros((4, 4))
    np.add.at(met, (np.asarray(first).ravel(), np.asarray(second).ravel()), 1)
    hits = met[np.triu_indices(4, 1)]
    # Both matches of a row are decided by its order: three orders, equally likely.
    statistic = ((hits[:3] - 2000) ** 2 / 2000).sum()
    assert hits.sum() == 12000
    assert statistic < 25.7


def test_information_and_width_differ_where_margins_are_large():
    """Control of the curvature: the widest pair is the one whose answer is known."""
    phi = jnp.array([[4.0, 0.0, 0.0], [-4.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    given = choice_set(jnp.array([8.0, -8.0, 0.1, 0.0]), None, phi, ellipsoid.init(3, ridge=1.0))
    widest = RULES["widest"](jax.random.key(0), given)
    informative = pairs.most_uncertain(jax.random.key(0), given)
    assert {int(widest.first), int(widest.second)} == {0, 1}
    assert {int(informative.first), int(informative.second)} == {2, 3}
    # And Sigma counts: along a direction that the data know, the other pair is asked.
    known = ellipsoid.update(ellipsoid.init(3, ridge=1.0), 30.0 * jnp.array([[0.0, 1.0, 0.0]]))
    turned = RULES["widest"](
        jax.random.key(0),
        given._replace(features=phi * jnp.array([[0.2, 1.0, 1.0]]), ellipsoid=known),
    )
    assert {int(turned.first), int(turned.second)} == {0, 1}


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
    assert pairs.tournament(key, choice_set(one)).first.shape == (8, 0)


def test_identical_responses():
    """Equal features are worth no comparison, and equal rewards no ranking."""
    phi = jnp.broadcast_to(jnp.array(PHI[0], "float32"), (RESPONSES, DIM))
    reward = jnp.full(RESPONSES, 0.3)
    found = choose(jax.random.key(5), reward, jnp.ones(RESPONSES, bool), phi)
    for name in ("most_uncertain", "widest", *RANKING):
        assert not found[name].valid, name
    for name in ("sampled", "uncertain_against"):
        assert found[name].valid
        assert found[name].first != found[name].second
    rows = jnp.array([[1, 2], [1, 2], [3, 0], [1, 2]])
    drawn = choice_sets.drawn(rows, reward=jnp.array([2.0, 2.0, 1.0, 2.0]))
    best = pairs.best_second(jax.random.key(6), drawn)
    assert (int(best.first), int(best.second)) == (0, 2)


def test_a_fallback_is_used_where_the_rule_makes_no_pair():
    reward = jnp.array([[0.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
    found = pairs.otherwise(pairs.best_worst, pairs.sampled)(jax.random.key(0), choice_set(reward))
    assert found.valid.tolist() == [True, True]
    assert found.first[0] != found.second[0]
    assert (int(found.first[1]), int(found.second[1])) == (1, 0)


def test_what_a_rule_needs_is_named():
    bare = choice_sets.enumerated(jnp.log(jnp.ones(3) / 3))
    for name, rule in RULES.items():
        if name != "sampled":
            missing = "reward" if name in RANKING else "features"
            with pytest.raises(ValueError, match=f"needs `{missing}`"):
                rule(jax.random.key(0), bare)
    with pytest.raises(ValueError, match=r"needs `agent`.*against_base"):
        pairs.between_agents()(jax.random.key(0), bare)
    with pytest.raises(ValueError, match="needs `ref_log_prob`"):
        pairs.against_reference(jax.random.key(0), bare)


def test_extreme_rewards():
    """Differences beyond float32, infinities, NaN as a kept reward (which counts as masked)."""
    key = jax.random.key(7)
    pair = pairs.best_worst(key, choice_set(jnp.array([1e38, -1e38, 0.0, jnp.nan])))
    assert (int(pair.first), int(pair.second)) == (0, 1)
    pair = pairs.best_worst(key, choice_set(jnp.array([-jnp.inf, 1.0, jnp.inf])))
    assert (int(pair.first), int(pair.second)) == (2, 0)
    assert not pairs.best_worst(key, choice_set(jnp.array([1.0, jnp.nan]))).valid


@functools.partial(jax.jit, static_argnames="rule")
def knock_out(key, reward, where, *, rule):
    return rule(key, choice_set(reward, where), decide=lambda key, margin: margin > 0)


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
    found = pairs.tournament(jax.random.key(8), choice_set(reward))
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
    mapped = jax.vmap(lambda k, r, w: pairs.best_worst(k, choice_set(r, w)))(
        jax.random.split(key, 8), reward, where
    )
    assert np.array_equal(mapped.first, plain["best_worst"].first)
