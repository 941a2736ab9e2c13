"""Preference models: their laws by definition, their draws, and that a fit takes each of them."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jax_klrlhf.core import bradley_terry, estimation, preferences

MARGIN = np.linspace(-4, 4, 17)


def sigma(x):
    return 1 / (1 + np.exp(-x))


def rao_kupper(m):
    won, lost = sigma(m - 1.0), sigma(-m - 1.0)
    return won, 1 - won - lost, lost


def davidson(m):
    total = np.exp(m / 2) + 0.8 + np.exp(-m / 2)
    return np.exp(m / 2) / total, 0.8 / total, np.exp(-m / 2) / total


MODELS = {
    "bradley_terry": (preferences.bradley_terry, lambda m: (sigma(m), sigma(-m))),
    "rao_kupper": (preferences.rao_kupper(1.0), rao_kupper),
    "davidson": (preferences.davidson(0.8), davidson),
    "flipped": (
        preferences.flipped(0.2),
        lambda m: (0.2 + 0.6 * sigma(m), 0.2 + 0.6 * sigma(-m)),
    ),
}


@pytest.fixture(params=MODELS)
def law(request):
    return MODELS[request.param]


def test_outcomes_have_their_probabilities_and_labels_between_two_are_mixtures(law, x64):
    model, probabilities = law
    want = probabilities(MARGIN)
    margin = jnp.array(MARGIN)
    np.testing.assert_allclose(np.exp(model.of(margin)), want, rtol=1e-7)
    for label, each in zip(model.outcomes, want, strict=True):
        np.testing.assert_allclose(model.nll(margin, label=label), -np.log(each), rtol=1e-6)
    step = 1 / (len(want) - 1)
    between = model.nll(margin, label=1 - 0.3 * step)
    np.testing.assert_allclose(between, -0.7 * np.log(want[0]) - 0.3 * np.log(want[1]), rtol=1e-6)
    np.testing.assert_allclose(
        model.mean(margin), sum(o * p for o, p in zip(model.outcomes, want, strict=True)), rtol=1e-6
    )
    # Which response stands first is a convention.
    np.testing.assert_allclose(model.nll(-margin, label=0.0), model.nll(margin), rtol=1e-12)


def test_slopes_curvatures_and_information_are_finite_differences(law, x64):
    model, probabilities = law
    margin, label = (
        jnp.array(MARGIN),
        jnp.array(model.outcomes)[jnp.arange(17) % len(model.outcomes)],
    )
    step = 1e-5

    def nll(at):
        return np.asarray(model.nll(jnp.array(at), label=label))

    slope = (nll(MARGIN + step) - nll(MARGIN - step)) / (2 * step)
    np.testing.assert_allclose(model.slope(margin, label), slope, atol=1e-8)
    bend = (nll(MARGIN + step) - 2 * nll(MARGIN) + nll(MARGIN - step)) / step**2
    np.testing.assert_allclose(model.curvature(margin, label), bend, atol=2e-5)
    moved = [np.array(probabilities(MARGIN + s)) for s in (step, -step)]
    rate = (moved[0] - moved[1]) / (2 * step)
    np.testing.assert_allclose(
        model.information(margin), (rate**2 / np.array(probabilities(MARGIN))).sum(0), rtol=1e-6
    )
    assert bool((model.curvature(margin, label) >= 0).all()) == model.concave


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_are_finite_in_value_and_gradient(law, margin):
    model, _ = law
    for label in model.outcomes:
        both = jax.value_and_grad(lambda m, label=label: model.nll(m, label=label))
        assert np.isfinite(both(jnp.array(margin))).all()


def test_bradley_terry_is_the_module_of_its_name_bit_by_bit():
    margin, label = jnp.array(MARGIN, jnp.float32), jnp.linspace(0, 1, 17)
    model = preferences.bradley_terry
    np.testing.assert_array_equal(
        model.nll(margin, label=label), bradley_terry.nll(margin, label=label)
    )
    np.testing.assert_array_equal(model.mean(margin), jax.nn.sigmoid(margin))
    key = jax.random.key(0)
    np.testing.assert_array_equal(model.sample(key, margin), bradley_terry.sample(key, margin))


def test_draws_have_the_law_with_flips(law):
    """20,000 draws at one margin: chi-square of 2 (1) dof is above 13.8 (10.8) once in 1,000."""
    model, probabilities = law
    n = 20_000
    drawn = model.sample(jax.random.key(1), jnp.full(n, 0.7), flip_rate=0.1)
    clean = np.array(probabilities(0.7))
    expected = n * (0.9 * clean + 0.1 * clean[::-1])
    got = np.array([(np.asarray(drawn) == o).sum() for o in model.outcomes])
    limit = {2: 10.8, 3: 13.8}[len(clean)]
    assert ((got - expected) ** 2 / expected).sum() < limit
    assert ((got - n * clean) ** 2 / (n * clean)).sum() > limit, "the flips must show"


def test_ranking_is_a_law_of_orders(x64):
    score = jnp.array([0.3, -1.0, 0.8])
    model = preferences.plackett_luce
    total, chosen = 0.0, 0.0
    for order in itertools.permutations(range(3)):
        ranks = np.argsort(order)
        weights = np.exp(np.asarray(score))[list(order)]
        want = math.prod(weights[k] / weights[k:].sum() for k in range(3))
        got = math.exp(-float(model.nll(score, label=jnp.array(ranks))))
        np.testing.assert_allclose(got, want, rtol=1e-12)
        total, chosen = total + got, chosen + got * (order[0] == 2)
    np.testing.assert_allclose(total, 1, rtol=1e-12)
    # The best alone: the sum over the orders of the others.
    one = math.exp(-float(model.nll(score, label=jnp.array([1, 1, 0]))))
    np.testing.assert_allclose(one, chosen, rtol=1e-12)
    pair = model.nll(score[:2], label=jnp.array([0, 1]))
    np.testing.assert_allclose(pair, bradley_terry.nll(score[0] - score[1]), rtol=1e-12)
    far = jax.grad(lambda s: model.nll(s, label=jnp.array([1, 0, 2])))(1e3 * score)
    assert np.isfinite(far).all()
    first = model.sample(jax.random.key(0), jnp.broadcast_to(score, (20_000, 3))) == 0
    prob = np.exp(score) / np.exp(score).sum()
    off = (np.asarray(first).sum(0) - 20_000 * prob) ** 2 / (20_000 * prob)
    assert off.sum() < 13.8  # two degrees of freedom: one in a thousand


Z = np.random.default_rng(5).normal(size=(40, 3))
TRUE = np.array([1.5, -1.0, 0.5])


def population(probabilities):
    """Every pair with every outcome, weighed by its probability: the fit is then theta itself."""
    weights = np.array(probabilities(Z @ TRUE))
    return np.concatenate([Z] * len(weights)), weights.ravel()


def test_the_fit_at_the_population_is_the_parameter_and_half_labels_shrink_it(law, x64):
    model, probabilities = law
    z, w = population(probabilities)
    y = np.repeat(model.outcomes, len(Z))
    data = jnp.array(z), jnp.array(y)
    found = estimation.fit(*data, weights=jnp.array(w), ridge=0.0, link=model)
    assert found.converged
    np.testing.assert_allclose(found.theta, TRUE, atol=1e-6)
    # The control: the same labels taken for Bradley-Terry's.
    plain = estimation.fit(*data, weights=jnp.array(w), ridge=0.0)
    ratio = np.linalg.norm(plain.theta) / np.linalg.norm(TRUE)
    assert ratio == pytest.approx(1, abs=1e-6) if model.logistic else ratio < 0.9
    # The mean label of each pair, a tally's form of these data: only where the model merges.
    mean = sum(o * p for o, p in zip(model.outcomes, probabilities(Z @ TRUE), strict=True))
    merged = estimation.fit(jnp.array(Z), jnp.array(mean), ridge=0.0, link=model)
    off = np.linalg.norm(merged.theta - TRUE)
    assert off < 1e-6 if model.merges else off > 0.1


@pytest.mark.slow
def test_a_rate_for_each_annotator_and_a_prior_against_scipy(x64):
    rng = np.random.default_rng(6)
    rate = np.array([0.02, 0.2, 0.4])[np.arange(40) % 3]
    y = (rng.uniform(size=40) < rate + (1 - 2 * rate) * sigma(Z @ TRUE)).astype(float)
    prior = np.array([1.0, 0.0, -1.0])

    def objective(theta):
        won = rate + (1 - 2 * rate) * sigma(Z @ theta)
        away = theta - prior
        return -(y * np.log(won) + (1 - y) * np.log(1 - won)).sum() + 0.35 * away @ away

    want = scipy.optimize.minimize(objective, prior, method="BFGS", options={"gtol": 1e-9}).x

    def fit(rate):
        return estimation.fit(
            jnp.array(Z),
            jnp.array(y),
            ridge=0.7,
            prior=jnp.array(prior),
            link=preferences.flipped(rate),
        )

    found = fit(jnp.array(rate))
    assert found.converged
    np.testing.assert_allclose(found.theta, want, atol=1e-6)
    # The gradient in the rates is that of the optimum.
    change = jax.grad(lambda r: fit(r).theta[0])(jnp.array(rate))[1]
    moved = [fit(jnp.array(rate + s * (np.arange(40) == 1))).theta[0] for s in (1e-5, -1e-5)]
    np.testing.assert_allclose(change, (moved[0] - moved[1]) / 2e-5, rtol=1e-5)


def test_a_bound_with_ties_is_the_constrained_optimum(x64):
    model, probabilities = MODELS["davidson"]
    z, w = population(probabilities)
    y = np.repeat(model.outcomes, len(Z))
    found = estimation.fit(
        jnp.array(z), jnp.array(y), weights=jnp.array(w), ridge=0.0, bound=0.8, link=model
    )
    assert found.converged
    theta = np.asarray(found.theta)
    np.testing.assert_allclose(np.linalg.norm(theta), 0.8, rtol=1e-12)
    gradient = jax.grad(estimation.nll)(
        found.theta, jnp.array(z), jnp.array(y), ridge=0.0, weights=jnp.array(w), link=model
    )
    multiplier = -gradient @ theta / 0.64
    assert multiplier > 0
    np.testing.assert_allclose(gradient, -multiplier * theta, atol=1e-8)


def test_rankings_are_fitted_by_the_same_newton(x64):
    """All orders of three, weighed by their probability, in 12 contexts; masked rows deleted."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(12, 3, 3))
    rows, ranks, weights = [], [], []
    for order in itertools.permutations(range(3)):
        score = np.exp(np.take_along_axis(x @ TRUE, np.array([order] * 12), 1))
        weights.append(score[:, 0] / score.sum(1) * score[:, 1] / score[:, 1:].sum(1))
        ranks.append(np.array([np.argsort(order)] * 12))
        rows.append(x)
    z, y, w = (np.concatenate(v) for v in (rows, ranks, weights))
    z, y = np.concatenate([z, np.full((1, 3, 3), np.nan)]), np.concatenate([y, [[0, 1, 2]]])
    data = jnp.array(z), jnp.array(y)
    found = estimation.fit(
        *data, ridge=0.0, weights=jnp.array([*w, 0.0]), link=preferences.plackett_luce
    )
    assert found.converged
    np.testing.assert_allclose(found.theta, TRUE, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: preferences.flipped(0.5), r"flip rate must lie in \[0, 0\.5\), got 0\.5"),
        (lambda: preferences.davidson(0.0), "tie must be > 0"),
        (lambda: preferences.rao_kupper(-1.0), "threshold must be > 0"),
        (lambda: preferences.matrix(jnp.full((1, 2, 2), 0.4)), "must be 1"),
        (
            lambda: estimation.hessian(
                jnp.zeros(1), jnp.ones((2, 1)), ridge=0.0, link=preferences.davidson(1.0)
            ),
            "give labels=",
        ),
    ],
)
def test_what_is_no_law_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
