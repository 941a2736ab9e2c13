"""Small inverses against NumPy, in both of their forms and beyond their size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import linalg

# Written out, in a loop, and by LAPACK.
SIZES = [1, 2, 7, linalg.UNROLLED + 1, linalg.SMALL + 1]


def matrices(dim: int) -> np.ndarray:
    """Three of them, eigenvalues from 1 to 1000."""
    rng = np.random.default_rng(dim)
    turns = np.linalg.qr(rng.normal(size=(3, dim, dim)))[0]
    values = 10 ** rng.uniform(0, 3, size=(3, 1, dim))
    return (turns * values) @ turns.swapaxes(1, 2)


@pytest.mark.parametrize("dim", SIZES)
def test_inverse(x64, dim):
    del x64
    many = matrices(dim)
    expected = np.linalg.inv(many)
    np.testing.assert_allclose(linalg.inverse(jnp.asarray(many[0])), expected[0], atol=1e-12)
    mapped = jax.jit(jax.vmap(linalg.inverse))(jnp.asarray(many))
    np.testing.assert_allclose(mapped, expected, atol=1e-12)


@pytest.mark.parametrize("dim", SIZES)
def test_inverse_factor(x64, dim):
    del x64
    many = matrices(dim)
    expected = np.linalg.inv(np.linalg.cholesky(many))
    mapped = jax.jit(jax.vmap(linalg.inverse_factor))(jnp.asarray(many))
    np.testing.assert_allclose(mapped, expected, atol=1e-12)


def test_float32_is_as_good_as_its_conditioning():
    """Condition 1000 and eps 1.2e-7: relative errors of about 1e-4 are all that may be had."""
    many = matrices(16)
    single = jnp.asarray(many, jnp.float32)
    error = np.asarray(jax.vmap(linalg.inverse)(single), np.float64) @ many - np.eye(16)
    assert np.abs(error).max() < 1e-3
    white = np.asarray(jax.vmap(linalg.inverse_factor)(single), np.float64)
    assert np.abs(white @ many @ white.swapaxes(1, 2) - np.eye(16)).max() < 1e-3


def test_not_positive_definite_is_nan_and_gradients_are_those_of_cholesky(x64):
    del x64
    assert np.isnan(linalg.inverse_factor(jnp.diag(jnp.array([1.0, -1.0])))).any()
    matrix = jnp.asarray(matrices(4)[0])

    def of(factor):
        return jax.grad(lambda a: jnp.sum(jnp.sin(factor(a + a.T))))(matrix / 2)

    by_lapack = of(lambda a: jnp.linalg.inv(jnp.linalg.cholesky(a)))
    np.testing.assert_allclose(of(linalg.inverse_factor), by_lapack, atol=1e-12)


@pytest.mark.parametrize(("rank", "jitter"), [(1, 1.2e-7), (2, 1.2e-7), (1, 1e-3), (6, 1e-3)])
def test_ball_minimum_is_the_constrained_minimum_of_any_model(rank, jitter):
    """In float32, singular up to a jitter of the rounding: never NaN, and within the ball.

    At conditions of 1e4, where float32 has three digits to give, the value is that of an
    eigendecomposition in float64 and a bisection for the multiplier.
    """
    rng = np.random.default_rng(rank)
    root = rng.normal(size=(60, 6, rank)) * 10 ** rng.uniform(-3, 1, size=(60, 1, 1))
    models = root @ root.swapaxes(1, 2)
    models += jitter * np.trace(models, axis1=1, axis2=2)[:, None, None] * np.eye(6)
    targets = rng.normal(size=(60, 6)) * 10 ** rng.uniform(-6, 6, size=(60, 1))
    single = jnp.asarray(models, jnp.float32), jnp.asarray(targets, jnp.float32)
    points, multipliers = jax.jit(jax.vmap(lambda m, t: linalg.ball_minimum(m, t, 1.0)))(*single)
    assert np.isfinite(points).all()
    assert (np.asarray(multipliers) >= 0).all()
    assert np.linalg.norm(points, axis=1).max() < 1 + 1e-6
    inside = np.linalg.norm(points, axis=1) < 0.99
    assert inside.any()
    assert (~inside).any()
    if jitter < 1e-6:
        return
    models, targets = (np.asarray(x, np.float64) for x in single)
    for model, target, point in zip(models, targets, np.asarray(points, np.float64), strict=True):
        values, axes = np.linalg.eigh(model)
        along = axes.T @ target
        best = None
        low, high = -12.0, 12.0  # of log10 mu
        if np.linalg.norm(along / values) <= 1:
            best = axes @ (along / values)
        else:
            for _ in range(200):
                middle = (low + high) / 2
                over = np.linalg.norm(along / (values + 10**middle)) > 1
                low, high = (middle, high) if over else (low, middle)
            best = axes @ (along / (values + 10**low))
        of = lambda u, m=model, t=target: u @ m @ u / 2 - t @ u  # noqa: E731
        assert of(point) <= of(best) + 1e-3 * abs(of(best)) + 1e-12
