"""Distances, coefficients, frontiers and calibration, each against its definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import divergence, diversity, gibbs, links, measure, numerics, welfare

pytestmark = pytest.mark.usefixtures("x64")
with jax.enable_x64(True):
    PROB = jnp.array([0.5, 0.3, 0.2])


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    first, second = jnp.array(rng.normal(size=(2, 3, 6)))
    return first, second, jax.nn.log_softmax(rng.normal(size=(3, 6)))


@pytest.mark.parametrize("level", [1e-4, 0.1, 1.0])
def test_the_coefficient_has_the_divergence_asked_for(world, level):
    reward, _, ref = world
    kl_coef = measure.at_divergence(reward, ref, divergence=level, context_prob=PROB)
    found = PROB @ divergence.categorical(gibbs.log_prob(reward, ref, kl_coef=kl_coef), ref)
    np.testing.assert_allclose(found, level, rtol=1e-8)
    scaled = measure.at_divergence(7 * reward, ref, divergence=level, context_prob=PROB)
    np.testing.assert_allclose(scaled, 7 * kl_coef, rtol=1e-8)


def test_the_ends_of_the_coefficient(world):
    reward, _, ref = world
    # No coefficient has a KL of 9 nats here: the least one, and its optimum is the best action.
    least = measure.at_divergence(reward, ref, divergence=9.0)
    np.testing.assert_allclose(jnp.exp(gibbs.log_prob(reward, ref, kl_coef=least)).max(-1), 1)
    assert jnp.isnan(measure.at_divergence(jnp.ones((3, 6)), ref, divergence=0.5))


def test_the_gibbs_policies_are_the_frontier(world):
    reward, gold, ref = world
    levels = jnp.array([0.1, 0.5, 1.0])
    found = measure.frontier(reward, gold, ref, divergences=levels, context_prob=PROB)
    for k in range(3):
        law = jnp.exp(gibbs.log_prob(reward, ref, kl_coef=found.kl_coef[k]))
        np.testing.assert_allclose(found.gold[k], PROB @ (law * gold).sum(-1), rtol=1e-9)
        # It wastes nothing on its own reward, and on another one something.
        gap = lambda r, law=law: measure.frontier_gap(jnp.log(law), r, ref, context_prob=PROB)  # noqa: E731
        np.testing.assert_allclose(gap(reward), 0, atol=1e-9)
        assert gap(gold) > 0.01
    other = jax.random.normal(jax.random.key(1), (40, 3, 6))
    gaps = jax.vmap(lambda x: measure.frontier_gap(jax.nn.log_softmax(x), reward, ref))(other)
    assert (gaps > 0).all()


def test_the_best_of_n_is_worth_its_law(world):
    reward, gold, ref = world
    found = measure.best_of_curve(reward, gold, ref, counts=(1, 2), context_prob=PROB)
    p = np.exp(ref)
    order = np.asarray(reward)
    two = p * (p[:, None] * (order[:, None] == order[:, :, None])).sum(-1)
    beats = np.einsum("xb,xab->xa", p, order[:, None] < order[:, :, None])
    two = two + 2 * p * beats
    np.testing.assert_allclose(found.gold, [PROB @ (q * gold).sum(-1) for q in (p, two)], rtol=1e-9)
    spent = [PROB @ (q * np.log(q / p)).sum(-1) for q in (p, two)]
    np.testing.assert_allclose(found.divergence, spent, rtol=1e-8, atol=1e-12)


def test_starc_and_epic_forget_scale_and_offsets_and_agree(world):
    first, second, ref = world
    starc = lambda a, b: measure.starc(a, b, ref, context_prob=PROB)  # noqa: E731
    moved = 5 * first + jnp.array([[1.0], [-2.0], [3.0]])
    np.testing.assert_allclose(starc(first, moved), 0, atol=1e-7)
    np.testing.assert_allclose(starc(first, -first), 2, rtol=1e-9)
    np.testing.assert_allclose(starc(first, jnp.ones((3, 6))), 1, rtol=1e-9)
    epic = measure.epic(first, second, ref, context_prob=PROB)
    np.testing.assert_allclose(starc(first, second), 2 * epic, rtol=1e-9)
    weight = np.asarray(PROB[:, None] * jnp.exp(ref)).ravel()
    centred = [np.asarray(measure.canonical(r, ref)).ravel() for r in (first, second)]
    covariance = np.cov(*centred, aweights=weight, ddof=0)
    rho = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    np.testing.assert_allclose(epic, np.sqrt((1 - rho) / 2), rtol=1e-9)


def test_the_span_bounds_variation_and_gap_and_two_actions_attain_tanh():
    """Over worlds and coefficients; the control is a bound of half the size, which must break."""
    keys = jax.random.split(jax.random.key(0), 200)

    def one(key):
        key_r, key_q, key_ref, key_c = jax.random.split(key, 4)
        r, q = jax.random.normal(key_r, (4,)), jax.random.normal(key_q, (4,))
        ref = jax.nn.log_softmax(2 * jax.random.normal(key_ref, (4,)))
        kl_coef = 10 ** jax.random.uniform(key_c, minval=-1.5, maxval=1.0)
        best, other = (gibbs.log_prob(x, ref, kl_coef=kl_coef) for x in (r, q))
        span = measure.span(r, q)
        variation = jnp.abs(jnp.exp(best) - jnp.exp(other)).sum() / 2
        gap = gibbs.gap(other, r, ref, kl_coef=kl_coef)
        return (
            variation / measure.variation_bound(span, kl_coef=kl_coef),
            gap / measure.gap_bound(span, kl_coef=kl_coef),
        )

    variation, gap = jax.vmap(one)(keys)
    assert variation.max() <= 1 + 1e-9
    assert gap.max() <= 1 + 1e-9
    assert variation.max() > 0.5
    assert gap.max() > 0.5
    # The cliff: a tie, perturbed by 0.01; what a smaller coefficient makes of it.
    for kl_coef in (1.0, 0.1, 0.01, 0.001):
        tie, even = jnp.array([0.005, -0.005]), jnp.log(jnp.array([0.5, 0.5]))
        laws = [jnp.exp(gibbs.log_prob(s * tie, even, kl_coef=kl_coef)) for s in (1, -1)]
        moved = jnp.abs(laws[0] - laws[1]).sum() / 2
        bound = measure.variation_bound(jnp.array(0.02), kl_coef=kl_coef)
        np.testing.assert_allclose(moved, bound, rtol=1e-9)


def test_calibration_is_the_weighted_gap_of_each_bin():
    rng = np.random.default_rng(1)
    margin, label, weight = rng.normal(0, 2, 500), rng.uniform(size=500), rng.uniform(size=500)
    margin[:5] = 0
    found = measure.calibration(
        jnp.array(margin), jnp.array(label), weight=jnp.array(weight), bins=7
    )
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = np.where(margin > 0, label, 1 - label)
    right[:5] = 0.5
    place = np.minimum(((confidence - 0.5) * 14).astype(int), 6)
    total = sum(abs((weight * (right - confidence))[place == b].sum()) for b in range(7))
    np.testing.assert_allclose(found, total / weight.sum(), rtol=1e-10)
    # The exact error of a calibrated model is 0, of one that is twice too sure is not.
    true = 1 / (1 + np.exp(-margin))
    assert measure.calibration(jnp.array(margin), jnp.array(true)) < 1e-12
    assert measure.calibration(2 * jnp.array(margin), jnp.array(true)) > 0.05
    brier = measure.brier(jnp.array(margin), jnp.array(label), weight=jnp.array(weight))
    np.testing.assert_allclose(brier, np.average((true - label) ** 2, weights=weight), rtol=1e-9)


def test_one_of_n_is_the_enumerated_probability():
    reward = np.array([1.0, 0.0, 1.0, 2.0, 0.5])
    prob = np.array([0.1, 0.3, 0.2, 0.15, 0.25])
    right = np.array([True, False, False, True, False])
    good, bad = (np.where(m, prob, 0) / prob[m].sum() for m in (right, ~right))
    expected = 0.0
    for a, *others in itertools.product(range(5), repeat=3):
        values = reward[[a, *others]]
        tied = (values == values.max()).sum()
        won = (reward[a] == values.max()) / tied
        expected += good[a] * bad[others].prod() * won
    found = measure.one_of_n(jnp.array(reward), jnp.log(prob), jnp.array(right), n=3)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert jnp.isnan(measure.one_of_n(jnp.array(reward), jnp.log(prob), jnp.ones(5, bool), n=3))


def test_win_rates_between_policies_and_at_equal_length():
    rng = np.random.default_rng(3)
    p, q = rng.dirichlet(np.ones(4), size=2)
    reward = rng.normal(size=4)
    prefer = links.matrix(jnp.array(reward))
    found = measure.win_rate(jnp.log(p), jnp.log(q), prefer)
    np.testing.assert_allclose(found, p @ np.asarray(prefer) @ q, rtol=1e-12)
    # A judge who likes length: sigma(0.4 + 1.5 length), expected outcomes in the place of draws.
    length = np.tanh(rng.normal(1.0, 1.0, (4000, 1)))
    wins = 1 / (1 + np.exp(-(0.4 + 1.5 * length[:, 0])))
    controlled = measure.controlled_win_rate(jnp.array(wins), jnp.array(length), ridge=1e-6)
    np.testing.assert_allclose(controlled.win_rate, 1 / (1 + np.exp(-0.4)), rtol=1e-6)
    assert wins.mean() > controlled.win_rate + 0.1


def test_the_influence_of_a_match_is_what_the_win_rate_moves_by_its_weight():
    """The derivative by each match's weight, by finite differences of the fit itself."""
    rng = np.random.default_rng(4)
    length, wins = jnp.array(rng.normal(size=(30, 1))), jnp.array(rng.random(30))
    weight = jnp.array(rng.uniform(0.5, 2.0, 30))
    found = measure.controlled_win_rate(wins, length, ridge=0.3, weight=weight)

    @jax.jit
    def rate(weight):
        return measure.controlled_win_rate(wins, length, ridge=0.3, weight=weight).win_rate

    for at in range(30):
        step = jnp.zeros(30).at[at].set(1e-4)
        slope = (rate(weight + step) - rate(weight - step)) / 2e-4
        np.testing.assert_allclose(found.influence[at], weight[at] * slope, atol=1e-8)


def test_diversity_of_policies_sets_and_matrices(world):
    ref = world[2]
    prob = np.exp(ref)
    per = -(prob * ref).sum(-1)
    np.testing.assert_allclose(diversity.per_input(ref, PROB), PROB @ per, rtol=1e-12)
    mean = PROB @ prob
    across = -(mean * np.log(mean)).sum()
    np.testing.assert_allclose(diversity.across_inputs(ref, PROB), across, rtol=1e-12)
    classes = jnp.array([[0, 1, 1, 0, 2, 2]] * 3)
    mass = np.stack([prob[:, np.asarray(classes[0]) == c].sum(1) for c in range(3)], 1)
    found = diversity.class_entropy(ref, classes)
    np.testing.assert_allclose(found, -(mass * np.log(mass)).sum(-1), rtol=1e-10)
    np.testing.assert_allclose(diversity.vendi(jnp.eye(5)), 5, rtol=1e-9)
    np.testing.assert_allclose(diversity.vendi(jnp.ones((5, 5))), 1, rtol=1e-9)
    blocks = jnp.kron(jnp.eye(2), jnp.ones((2, 2)))
    weight = jnp.array([0.1, 0.2, 0.3, 0.4])
    groups = np.array([0.3, 0.7])
    expected = np.exp(-(groups * np.log(groups)).sum())
    np.testing.assert_allclose(diversity.vendi(blocks, weight), expected, rtol=1e-9)
    matrix = np.random.default_rng(0).normal(size=(4, 3))
    share = np.linalg.svd(matrix, compute_uv=False)
    share /= share.sum()
    expected = np.exp(-(share * np.log(share)).sum())
    np.testing.assert_allclose(diversity.effective_rank(jnp.array(matrix)), expected, rtol=1e-9)
    top = diversity.top(ref, k=2)
    best = np.sort(prob, -1)[:, -2:]
    np.testing.assert_allclose(top.mass, best.sum(-1), rtol=1e-12)
    share = best / best.sum(-1, keepdims=True)
    np.testing.assert_allclose(top.entropy, -(share * np.log(share)).sum(-1), rtol=1e-10)


def test_welfare_against_loops():
    rng = np.random.default_rng(4)
    values = rng.uniform(size=(2, 7))
    for row, found in zip(values, welfare.gini(jnp.array(values)), strict=True):
        expected = sum(abs(a - b) for a in row for b in row) / (2 * 49 * row.mean())
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    ordered = np.sort(values, -1)
    found = welfare.worst_share(jnp.array(values), share=2.5 / 7)
    np.testing.assert_allclose(found, (ordered[:, :2].sum(-1) + ordered[:, 2] / 2) / 2.5)
    np.testing.assert_allclose(welfare.worst_share(jnp.array(values), share=1.0), values.mean(-1))
    np.testing.assert_allclose(welfare.worst_share(jnp.array(values), share=0.01), ordered[:, 0])
    points = rng.uniform(size=(6, 3))
    draws = rng.uniform(size=(200_000, 3))
    inside = (points[None] >= draws[:, None]).all(-1).any(-1)
    # Monte Carlo over the unit cube: 5 standard errors, a false alarm in 2 million.
    error = 5 * inside.std() / np.sqrt(len(draws))
    found = welfare.hypervolume(jnp.array(points), jnp.zeros(3))
    assert abs(float(found) - inside.mean()) < error
    # Below the reference a point adds nothing, and a dominated one neither.
    more = np.concatenate([points, [points[0] / 2, [2.0, 2.0, -1.0]]])
    np.testing.assert_allclose(welfare.hypervolume(jnp.array(more), jnp.zeros(3)), found)
    dominated = np.asarray(welfare.dominated(jnp.array(more)))
    expected = [
        any((q >= p).all() and (q > p).any() for q in more) for p in more
    ]  # fmt: skip
    np.testing.assert_array_equal(dominated, expected)
    directions = rng.dirichlet(np.ones(3), size=4)
    expected = np.mean([min((w * abs(1 - p)).max() for p in points) for w in directions])
    found = welfare.r2(jnp.array(points), jnp.array(directions), jnp.ones(3))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_masked_actions_reach_no_measure(world):
    reward, _, ref = world
    where = jnp.ones((3, 6), bool).at[:, 2].set(False)
    bad = reward.at[:, 2].set(jnp.nan)
    keep = np.array([0, 1, 3, 4, 5])
    short = ref[:, keep] - jnp.log(jnp.exp(ref[:, keep]).sum(-1, keepdims=True))
    masked = jnp.where(where, ref - numerics.masked_logsumexp(ref, where)[:, None], -jnp.inf)
    one = measure.at_divergence(bad, masked, divergence=0.3, where=where)
    two = measure.at_divergence(reward[:, keep], short, divergence=0.3)
    np.testing.assert_allclose(one, two, rtol=1e-9)
    canonical = measure.canonical(bad, masked, where=where)
    np.testing.assert_allclose(canonical[:, keep], measure.canonical(reward[:, keep], short))
    np.testing.assert_allclose(
        measure.span(bad, 0 * reward, where=where), measure.span(reward[:, keep], 0 * short)
    )
