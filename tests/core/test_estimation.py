"""The fit against scipy in float64, its optimality conditions, masks, gradients and extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jax_klrlhf.core import estimation

ROWS, DIM = 24, 3
RNG = np.random.default_rng(20)
Z = RNG.normal(size=(ROWS, DIM))
TRUE = np.array([1.5, -1.0, 0.5])
# Every fourth label is wrong, so that no direction separates the data.
HARD = ((Z @ TRUE > 0) ^ (np.arange(ROWS) % 4 == 0)).astype(float)
SOFT = RNG.uniform(0.05, 0.95, size=ROWS)
WEIGHTS = RNG.uniform(0.2, 3.0, size=ROWS)


def numpy_objective(theta, z, y, w, ridge):
    """Value and gradient, written from the definition in float64 NumPy."""
    margin = z @ theta
    loss = y * np.logaddexp(0, -margin) + (1 - y) * np.logaddexp(0, margin)
    error = 1 / (1 + np.exp(-margin)) - y
    return w @ loss + ridge / 2 * theta @ theta, z.T @ (w * error) + ridge * theta


def numpy_fit(z, y, w, ridge):
    found = scipy.optimize.minimize(
        numpy_objective,
        np.zeros(z.shape[1]),
        (z, y, w, ridge),
        "BFGS",
        True,
        options={"gtol": 1e-9},
    )
    return found.x


fit = jax.jit(estimation.fit, static_argnames=("iterations",))


@pytest.mark.parametrize("labels", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("weights", [np.ones(ROWS), WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("ridge", [0.0, 2.0])
def test_equals_scipy(x64, labels, weights, ridge):
    z, y, w = jnp.array(Z), jnp.array(labels), jnp.array(weights)
    found = fit(z, y, ridge=ridge, weights=w)
    assert found.converged
    np.testing.assert_allclose(found.theta, numpy_fit(Z, labels, weights, ridge), atol=1e-7)
    value, gradient = numpy_objective(np.asarray(found.theta), Z, labels, weights, ridge)
    assert np.abs(gradient).max() < 1e-12 * ROWS
    np.testing.assert_allclose(
        estimation.nll(found.theta, z, y, ridge=ridge, weights=w), value, rtol=1e-12
    )


@pytest.mark.parametrize("ridge", [0.0, 2.0])
@pytest.mark.parametrize("radius", [0.02, 0.3, 0.9])
def test_bounded_fit_is_the_constrained_optimum(x64, ridge, radius):
    """KKT: grad = -mu theta with mu > 0 on the sphere; scipy's constrained optimum; no rescale."""
    z, y = jnp.array(Z), jnp.array(HARD)
    found = fit(z, y, ridge=ridge, bound=radius)
    theta = np.asarray(found.theta)
    assert found.converged
    value, gradient = numpy_objective(theta, Z, HARD, np.ones(ROWS), ridge)
    assert abs(np.linalg.norm(theta) - radius) < 1e-13
    multiplier = -gradient @ theta / radius**2
    assert multiplier > 0
    assert np.abs(gradient + multiplier * theta).max() < 1e-11 * ROWS
    reference = scipy.optimize.minimize(
        numpy_objective,
        np.zeros(DIM),
        (Z, HARD, np.ones(ROWS), ridge),
        method="SLSQP",
        jac=True,
        constraints={
            "type": "ineq",
            "fun": lambda t: radius**2 - t @ t,
            "jac": lambda t: -2 * t,
        },
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(theta, reference.x, atol=1e-6)
    free = numpy_fit(Z, HARD, np.ones(ROWS), ridge)
    rescaled = radius * free / np.linalg.norm(free)
    assert numpy_objective(rescaled, Z, HARD, np.ones(ROWS), ridge)[0] > value + 1e-5


def test_slack_bound_changes_nothing(x64):
    z, y = jnp.array(Z), jnp.array(HARD)
    free = fit(z, y, ridge=1.0)
    slack = fit(z, y, ridge=1.0, bound=jnp.linalg.norm(free.theta) * 1.001)
    assert slack.converged
    np.testing.assert_allclose(slack.theta, free.theta, rtol=1e-10)


@given(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS), st.booleans())
def test_weight_zero_is_deletion(mask, poisoned):
    """Also where the deleted rows hold NaN, and as a boolean mask."""
    keep = np.array(mask)
    z, y, w = Z.copy(), HARD.copy(), WEIGHTS * keep
    if poisoned:
        z[~keep], y[~keep] = np.nan, np.nan
    masked = fit(
        jnp.array(z, "float32"), jnp.array(y, "float32"), ridge=0.5, weights=jnp.array(w, "float32")
    )
    expected = numpy_fit(Z[keep], HARD[keep], WEIGHTS[keep], 0.5)
    assert masked.converged
    np.testing.assert_allclose(masked.theta, expected, atol=2e-5)


def test_gradient_through_a_deleted_row_is_zero(x64):
    """And the gradients of the kept rows are those of the smaller data set."""
    keep = np.arange(ROWS) % 3 != 0
    z = np.where(keep[:, None], Z, np.nan)

    def total(z, y, w):
        return estimation.fit(z, y, ridge=0.5, weights=w).theta @ jnp.array(TRUE)

    gradient = jax.jit(jax.grad(total, (0, 1, 2)))
    masked = gradient(jnp.array(z), jnp.array(SOFT), jnp.array(WEIGHTS * keep))
    small = gradient(jnp.array(Z[keep]), jnp.array(SOFT[keep]), jnp.array(WEIGHTS[keep]))
    for full, part in zip(masked, small, strict=True):
        assert np.all(np.asarray(full)[~keep] == 0)
        np.testing.assert_allclose(np.asarray(full)[keep], part, atol=1e-12)


def test_integer_weights_repeat_rows(x64):
    times = np.arange(ROWS) % 3
    weighted = fit(jnp.array(Z), jnp.array(HARD), ridge=0.5, weights=jnp.array(times))
    repeated = fit(jnp.array(Z.repeat(times, 0)), jnp.array(HARD.repeat(times)), ridge=0.5)
    np.testing.assert_allclose(weighted.theta, repeated.theta, atol=1e-12)


@pytest.mark.parametrize("bound", [None, 0.1])
def test_gradients_are_those_of_the_optimum(x64, bound):
    """check_grads compares with finite differences, in both modes."""
    z, y, w = jnp.array(Z[:8]), jnp.array(SOFT[:8]), jnp.array(WEIGHTS[:8])
    if bound is None:
        check_grads(
            jax.jit(lambda z, y, w, r: estimation.fit(z, y, ridge=r, weights=w).theta),
            (z, y, w, jnp.array(0.7)),
            order=1,
            atol=1e-6,
            rtol=1e-6,
        )
    else:
        active = fit(z, y, ridge=0.7, weights=w, bound=bound)
        assert abs(jnp.linalg.norm(active.theta) - bound) < 1e-12
        check_grads(
            jax.jit(lambda z, y, w, b: estimation.fit(z, y, ridge=0.7, weights=w, bound=b).theta),
            (z, y, w, jnp.array(bound)),
            order=1,
            atol=1e-6,
            rtol=1e-6,
        )


def test_separable_data():
    """No optimum without ridge or bound: finite, and says so. Either of them makes one."""
    z = jnp.abs(jnp.array(Z, "float32"))
    ones = jnp.ones(ROWS)
    for iterations in (30, 400):  # 400: every probability has underflowed long before
        open_end = fit(z, ones, ridge=0.0, iterations=iterations)
        assert jnp.all(jnp.isfinite(open_end.theta))
        assert not open_end.converged
    assert fit(z, ones, ridge=1e-3).converged
    bounded = fit(z, ones, ridge=0.0, bound=5.0)
    assert bounded.converged
    np.testing.assert_allclose(jnp.linalg.norm(bounded.theta), 5.0, rtol=1e-6)


def test_quasi_separable_data():
    """Two rows contradict each other along one axis; the other axis is separated."""
    z = jnp.array([[1.0, 0.5], [1.0, 0.5], [-0.5, 1.0]])
    for iterations in (30, 400):
        found = fit(z, jnp.array([1.0, 0.0, 1.0]), ridge=0.0, iterations=iterations)
        assert jnp.all(jnp.isfinite(found.theta))
        assert not found.converged


def test_budget_is_reported():
    found = fit(jnp.array(Z, "float32"), jnp.array(HARD, "float32"), ridge=0.1, iterations=1)
    assert not found.converged
    assert found.iterations == 1


def test_rank_deficient_data_without_ridge():
    """A direction without data stays where it began; the rest is the fit of the smaller problem."""
    z = Z * np.array([1.0, 1.0, 0.0])
    found = fit(jnp.array(z, "float32"), jnp.array(HARD, "float32"), ridge=0.0)
    assert found.converged
    assert found.theta[2] == 0
    expected = numpy_fit(z[:, :2], HARD, np.ones(ROWS), 0.0)
    np.testing.assert_allclose(found.theta[:2], expected, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_scale_of_the_features(scale):
    """theta scales inversely: margins, hence convergence, do not depend on the units."""
    z = jnp.array(Z * scale, "float32")
    found = fit(z, jnp.array(HARD, "float32"), ridge=0.0)
    assert found.converged
    expected = numpy_fit(Z, HARD, np.ones(ROWS), 0.0)
    np.testing.assert_allclose(found.theta * scale, expected, rtol=1e-4)


def test_far_start_and_identical_responses():
    """Begin at margins of 1e4 on the wrong side; rows that are all zero; no kept row."""
    z, y = jnp.array(Z, "float32"), jnp.array(HARD, "float32")
    far = fit(z, y, ridge=1.0, init=jnp.array(-1e4 * TRUE, "float32"), iterations=30)
    assert far.converged
    np.testing.assert_allclose(far.theta, fit(z, y, ridge=1.0).theta, atol=1e-5)
    blank = fit(jnp.zeros_like(z), y, ridge=0.0)
    assert blank.converged
    assert jnp.all(blank.theta == 0)
    empty = fit(z, y, ridge=0.5, weights=jnp.zeros(ROWS, bool))
    assert empty.converged
    assert jnp.all(empty.theta == 0)


def test_growing_data_in_scan_and_vmap(x64):
    """Prefix masks, warm starts, several seeds: equal to single cold fits."""
    shuffles = jnp.array(np.stack([np.random.default_rng(s).permutation(ROWS) for s in range(2)]))
    z, y = jnp.array(Z)[shuffles], jnp.array(HARD)[shuffles]

    def simulate(z, y):
        def round_(theta, seen):
            found = estimation.fit(
                z, y, ridge=0.5, bound=1.2, weights=jnp.arange(ROWS) < seen, init=theta
            )
            return found.theta, found

        return jax.lax.scan(round_, jnp.zeros(DIM), jnp.array([0, 1, 9, ROWS]))[1]

    found = jax.jit(jax.vmap(simulate))(z, y)
    assert jnp.all(found.converged)
    for seed in range(2):
        for step, seen in enumerate([0, 1, 9, ROWS]):
            alone = fit(z[seed], y[seed], ridge=0.5, bound=1.2, weights=jnp.arange(ROWS) < seen)
            np.testing.assert_allclose(found.theta[seed, step], alone.theta, atol=1e-10)


def test_hessian_is_the_second_derivative(x64):
    args = (jnp.array(Z), jnp.array(SOFT))
    options = {"ridge": 0.3, "weights": jnp.array(WEIGHTS)}
    theta = jnp.array(TRUE)
    expected = jax.hessian(estimation.nll)(theta, *args, **options)
    np.testing.assert_allclose(
        estimation.hessian(theta, args[0], **options), expected, rtol=1e-12, atol=1e-12
    )


def test_eight_devices_equal_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    z, y = jnp.array(Z, "float32"), jnp.array(HARD, "float32")
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = fit(jax.device_put(z, rows), jax.device_put(y, rows), ridge=0.5)
    np.testing.assert_allclose(sharded.theta, fit(z, y, ridge=0.5).theta, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": -1.0}, "ridge must be >= 0"),
        ({"ridge": 0.0, "bound": 0.0}, "bound must be > 0"),
        ({"ridge": 0.0, "iterations": 0}, "iterations must be at least 1"),
    ],
)
def test_wrong_facts(options, message):
    with pytest.raises(ValueError, match=message):
        estimation.fit(jnp.ones((2, 1)), jnp.ones(2), **options)


def test_small_steps_are_not_the_end_while_the_objective_falls(x64):
    """A ridge so large that no margin moves by sqrt(eps): the decrement alone says to go on.

    One damped step leaves a relative error of half the margin's move, 1e-9.
    """
    found = fit(jnp.array(Z), jnp.array(HARD), ridge=1e10)
    assert found.converged
    theta = np.zeros(DIM)
    for _ in range(4):  # plain Newton, in NumPy
        prob = 1 / (1 + np.exp(-Z @ theta))
        slope = Z.T @ (prob - HARD) + 1e10 * theta
        curvature = (Z.T * (prob * (1 - prob))) @ Z + 1e10 * np.eye(DIM)
        theta = theta - np.linalg.solve(curvature, slope)
    assert 1e-10 < np.abs(Z @ theta).max() < np.sqrt(np.finfo(float).eps)
    np.testing.assert_allclose(found.theta, theta, rtol=1e-13)


def test_a_large_fit_holds_no_weighted_copy_of_its_rows():
    """By the compiler's own count; the Gram matrix in blocks of columns is the whole one's."""
    rows, dim = 8192, 520  # not a multiple of the block
    z, y = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, dim), (rows,)))
    fit = jax.jit(lambda z, y: estimation.fit(z, y, ridge=1.0))
    memory = fit.lower(z, y).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * rows * dim
    rng = np.random.default_rng(0)
    z = rng.normal(size=(estimation._LARGE // dim + 1, dim)).astype(np.float32)
    theta = (rng.normal(size=dim) / 25).astype(np.float32)
    found = estimation.hessian(jnp.asarray(theta), jnp.asarray(z), ridge=1.0)
    chance = 1 / (1 + np.exp(-z.astype(np.float64) @ theta))
    exact = (z.astype(np.float64).T * (chance * (1 - chance))) @ z + np.eye(dim)
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())
