"""The Laplace posterior and what follows from it, against sums and integrals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from jax_klrlhf.core import estimation, measure, posterior

pytestmark = pytest.mark.usefixtures("x64")
MEANS, VARIANCES = np.array([-2.0, 0.0, 0.7, 3.0]), np.array([0.5, 4.0, 1.0, 9.0])


def integral(function, mean, variance):
    density = stats.norm(mean, np.sqrt(variance)).pdf
    wide = 10 * np.sqrt(variance)
    return integrate.quad(lambda m: function(m) * density(m), mean - wide, mean + wide)[0]


def sigmoid(m):
    return 1 / (1 + np.exp(-m))


def entropy(p):
    return -(p * np.log(p) + (1 - p) * np.log1p(-p))


def test_margins_and_draws_have_the_gaussians_moments():
    rng = np.random.default_rng(0)
    square = rng.normal(size=(3, 3))
    state = posterior.laplace(jnp.array([1.0, -1.0, 0.5]), jnp.array(square @ square.T + np.eye(3)))
    z = rng.normal(size=(2, 5, 3))
    covariance = np.linalg.inv(state.precision)
    found = posterior.margin(state, jnp.array(z))
    np.testing.assert_allclose(found.mean, z @ np.asarray(state.mean), rtol=1e-10)
    expected = np.einsum("abi,ij,abj->ab", z, covariance, z)
    np.testing.assert_allclose(found.variance, expected, rtol=1e-9)
    draws = np.asarray(posterior.draw(jax.random.key(0), state, 40_000))
    # 40,000 draws: five standard errors of a covariance entry, at most sqrt(2) var / 200 each.
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert (np.abs(np.cov(draws.T) - covariance) < 5 * np.sqrt(2) / 200 * scale).all()
    error = 5 * np.sqrt(np.diag(covariance)) / 200
    assert (np.abs(draws.mean(0) - np.asarray(state.mean)) < error).all()


@pytest.mark.parametrize("case", range(4))
def test_probability_information_deferral_against_integrals(case):
    mean, variance = MEANS[case], VARIANCES[case]
    as_arrays = jnp.array(mean), jnp.array(variance)
    predicted = integral(sigmoid, mean, variance)
    assert abs(posterior.probability(*as_arrays) - predicted) < 0.02
    for eps in (0.0, 0.2):

        def noisy(m, eps=eps):
            return eps + (1 - 2 * eps) * sigmoid(m)

        inside = integral(lambda m, noisy=noisy: entropy(noisy(m)), mean, variance)
        expected = entropy(integral(noisy, mean, variance)) - inside
        found = posterior.information(*as_arrays, flip_rate=eps)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    gain = integral(lambda m: max(m, 0), mean, variance) - max(mean, 0)
    found = posterior.deferral(*as_arrays, cost=0.1)
    np.testing.assert_allclose(found, gain - 0.1, rtol=1e-4, atol=1e-6)
    errs = integral(lambda m: m * sigmoid(m), mean, variance)
    np.testing.assert_allclose(posterior.overseen(*as_arrays), errs, rtol=1e-3, atol=1e-5)


def test_asking_is_never_bad_without_a_cost_unless_the_overseer_errs():
    mean = jnp.linspace(-4, 4, 33)
    gain = posterior.deferral(mean, jnp.full(33, 0.5))
    assert (gain >= 0).all()
    assert (posterior.deferral(mean, jnp.zeros(33)) == 0).all()
    assert posterior.information(jnp.array(0.3), jnp.array(2.0), flip_rate=0.5) == 0
    # E U = -1 and nearly known: deferring to sigma(U) loses, an overseer without error never does.
    assert posterior.overseen(jnp.array(-1.0), jnp.array(0.01)) < -0.2


def test_the_variance_of_a_reward_is_not_identified_and_of_a_difference_is():
    """A constant added to every feature changes nothing that was compared."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(12, 3))
    first, second = rng.integers(0, 12, (2, 60))

    def variances(features):
        z = jnp.array(features[first] - features[second])
        fit = estimation.fit(z, jnp.array((first + second) % 2.0), ridge=1.0)
        state = posterior.laplace(fit.theta, estimation.hessian(fit.theta, z, ridge=1.0))
        x = jnp.array(features)
        return [posterior.margin(state, v).variance for v in (x, x - x.mean(0, keepdims=True))]

    (plain, centred), (moved, same) = variances(features), variances(features + 3.0)
    np.testing.assert_allclose(same, centred, rtol=1e-8)
    assert (moved / plain).max() > 2


def test_laplace_calibrates_off_the_data_and_not_within():
    """200 worlds of 20 labels, exact errors; the control is what happens on the data's inputs."""
    dim, n = 4, 20

    def one(key):
        keys = jax.random.split(key, 4)
        theta = 2 * jax.random.normal(keys[0], (dim,)) / np.sqrt(dim)
        z = jax.random.normal(keys[1], (n, dim))
        y = jax.random.bernoulli(keys[2], jax.nn.sigmoid(z @ theta))
        fit = estimation.fit(z, y, ridge=1.0)
        state = posterior.laplace(fit.theta, estimation.hessian(fit.theta, z, ridge=1.0))
        test = jax.random.normal(keys[3], (400, dim))

        def errors(test):
            true = jax.nn.sigmoid(test @ theta)
            mean, variance = posterior.margin(state, test)
            shrunk = mean / jnp.sqrt(1 + jnp.pi / 8 * variance)
            return jnp.array([measure.brier(m, true) for m in (mean, shrunk)])

        return errors(test), errors(3 * test)

    near, far = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 200))
    gain_near, gain_far = near[:, 0] - near[:, 1], far[:, 0] - far[:, 1]
    error = gain_far.std() / np.sqrt(200)
    assert gain_far.mean() > 4 * error
    assert gain_far.mean() > 2 * gain_near.mean()
