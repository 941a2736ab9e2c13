"""The small tools: each test is the trap that the tool is there for."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import numerics


def test_safe_sqrt_is_sqrt_with_a_gradient_that_stays_finite_at_zero():
    x = jnp.array([4.0, 0.25, 0.0, -1e-12])
    np.testing.assert_allclose(numerics.safe_sqrt(x), [2.0, 0.5, 0.0, 0.0])
    slope = jax.grad(lambda x: jnp.sum(numerics.safe_sqrt(x)))(x)
    np.testing.assert_allclose(slope, [0.25, 1.0, 0.0, 0.0])

    def norm(z):
        return numerics.safe_sqrt(z @ z)

    np.testing.assert_array_equal(jax.grad(norm)(jnp.zeros(3)), 0)  # identical responses
    plain = jax.grad(lambda z: jnp.sqrt(z @ z))(jnp.zeros(3))
    assert jnp.isnan(plain).all(), "the trap is gone: safe_sqrt has lost its reason"


def test_linear_exp_is_exp_below_and_a_tangent_above():
    limit = numerics.EXP_LIMIT
    below = jnp.array([-1e4, -1.0, 0.0, limit - 1])
    np.testing.assert_allclose(numerics.linear_exp(below), np.exp(np.float64(below)), rtol=1e-5)
    above = limit + jnp.array([0.0, 1.0, 1e4])
    np.testing.assert_allclose(
        numerics.linear_exp(above), np.exp(limit) * (1 + np.array([0.0, 1.0, 1e4])), rtol=1e-5
    )
    slope = jax.vmap(jax.grad(numerics.linear_exp))(jnp.array([0.0, limit, limit + 5, 1e4]))
    np.testing.assert_allclose(slope, np.exp([0.0, limit, limit, limit]), rtol=1e-5)


def random_row(seed: int, actions: int = 6):
    rng = np.random.default_rng(seed)
    keep = rng.random(actions) < 0.6
    keep[0] = True
    return rng.normal(size=actions) * 3, rng.normal(size=actions), keep


@pytest.mark.parametrize("seed", range(3))
def test_masking_equals_deleting_in_value_and_gradient(seed, x64):
    x, value, keep = random_row(seed)
    log_prob = np.where(keep, x, np.nan)
    junk = np.where(keep, value, np.inf)

    def masked(lp, v):
        where = jnp.array(keep)
        total = numerics.masked_logsumexp(lp, where)
        return total + numerics.expectation(lp, v, where=where)

    def deleted(lp, v):
        return jax.nn.logsumexp(lp) + jnp.exp(lp) @ v

    arguments = jnp.array(log_prob), jnp.array(junk)
    kept = jnp.array(x[keep]), jnp.array(value[keep])
    np.testing.assert_allclose(masked(*arguments), deleted(*kept), rtol=1e-13)
    slopes = (
        jax.jit(jax.grad(loss, (0, 1)))(*at) for loss, at in ((masked, arguments), (deleted, kept))
    )
    for got, want in zip(*slopes, strict=True):
        np.testing.assert_allclose(got[keep], want, rtol=1e-12)
        np.testing.assert_array_equal(got[~keep], 0)


def test_empty_rows_and_extremes_of_logsumexp():
    x = jnp.array([[1e4, 1e4], [-1e4, -1e4], [3.0, 5.0]])
    where = jnp.array([[True, True], [True, True], [False, False]])
    log2 = np.log(2)
    np.testing.assert_allclose(
        numerics.masked_logsumexp(x, where), [1e4 + log2, -1e4 + log2, -np.inf]
    )
    slope = jax.vmap(jax.grad(numerics.masked_logsumexp))(x, where)
    np.testing.assert_allclose(slope, [[0.5, 0.5], [0.5, 0.5], [0, 0]])
    np.testing.assert_array_equal(numerics.masked_max(x, where), [1e4, -1e4, 0])


def test_log_of_no_mass_at_all_is_minus_infinity_and_what_is_not_a_number_is_seen():
    """Kept entries of mass 0 are no entries; NaN at one that is kept must not vanish."""
    nothing, mask = jnp.full(2, -jnp.inf), jnp.ones(2, bool)
    assert numerics.masked_logsumexp(nothing, mask) == -jnp.inf
    np.testing.assert_array_equal(jax.grad(numerics.masked_logsumexp)(nothing, mask), 0)
    half = jnp.array([-jnp.inf, 2.0])
    assert numerics.masked_logsumexp(half, mask) == 2
    np.testing.assert_array_equal(jax.grad(numerics.masked_logsumexp)(half, mask), [0, 1])
    assert jnp.isnan(numerics.masked_logsumexp(jnp.array([jnp.nan, 2.0]), mask))


def test_expectation_takes_zero_times_infinity_as_zero():
    log_prob = jnp.log(jnp.array([0.5, 0.5, 0.0]))
    value = jnp.array([1.0, 3.0, jnp.inf])
    assert numerics.expectation(log_prob, value) == 2.0
    slopes = jax.grad(numerics.expectation, (0, 1))(log_prob, value)
    np.testing.assert_allclose(slopes, [[0.5, 1.5, 0.0], [0.5, 0.5, 0.0]])
    nothing = jnp.zeros(3, bool)
    assert numerics.expectation(log_prob, value, where=nothing) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_exp_remainder_has_all_digits_at_every_size(dtype, x64):
    """Against the series, summed in rational numbers."""
    points = [s * 10.0**e for e in range(-8, 2) for s in (-0.999, 0.5, 1.0, -1.0, 0.49999)]
    x = np.array(points, dtype)
    want = []
    for value in x.tolist():
        exact, term = Fraction(0), Fraction(value)
        for order in range(2, 90):
            term *= Fraction(value) / order
            exact += term
        want.append(float(exact))
    found = numerics.exp_remainder(jnp.array(x))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, want, rtol=8 * float(jnp.finfo(dtype).eps))
    slope = jax.vmap(jax.grad(numerics.exp_remainder))(jnp.array(x))
    np.testing.assert_allclose(slope, np.expm1(x), rtol=8 * float(jnp.finfo(dtype).eps))


def test_checks_look_at_what_is_concrete_only():
    @jax.jit
    def traced(x):
        numerics.check_positive("x", x)
        return x

    assert traced(-1.0) == -1
    for bad in (-1, 0, math.nan, jnp.array([1.0, -3.0])):
        with pytest.raises(ValueError, match="ridge must be > 0, got"):
            numerics.check_positive("ridge", bad)
    numerics.check_positive("ridge", 0, or_zero=True)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 0\.5\), got 0\.5: flip them"):
        numerics.check_between("rate", 0.5, 0, 0.5, high_open=True, why="flip them")
