"""The ellipsoid against float64 NumPy, streams against batches, masks, gradients, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jax_klrlhf.core import ellipsoid

ROWS, DIM, RIDGE = 16, 3, 0.7
RNG = np.random.default_rng(21)
Z = RNG.normal(size=(ROWS, DIM))
V = RNG.normal(size=(2, 5, DIM))
WEIGHTS = RNG.uniform(0.2, 3.0, size=ROWS)
SIGMA = RIDGE * np.eye(DIM) + Z.T @ (WEIGHTS[:, None] * Z)


def build(dtype):
    state = ellipsoid.init(DIM, ridge=RIDGE, dtype=dtype)
    return ellipsoid.update(state, jnp.array(Z, dtype), weights=jnp.array(WEIGHTS, dtype))


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("float64", 1e-13)])
def test_equals_numpy(x64, dtype, rtol):
    state, v = build(dtype), jnp.array(V, dtype)
    inverse = np.linalg.inv(SIGMA)
    np.testing.assert_allclose(state.precision, SIGMA, rtol=rtol, atol=rtol)
    norms = ellipsoid.norm(state, v)
    assert norms.dtype == state.precision.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(norms, np.sqrt(np.einsum("...i,ij,...j", V, inverse, V)), rtol=rtol)
    np.testing.assert_allclose(ellipsoid.solve(state, v), V @ inverse, rtol=10 * rtol, atol=rtol)
    np.testing.assert_allclose(ellipsoid.log_det(state), np.linalg.slogdet(SIGMA)[1], rtol=rtol)
    white = ellipsoid.whiten(state, v)
    np.testing.assert_allclose(jnp.linalg.norm(white, axis=-1), norms, rtol=rtol)
    gram = np.einsum("...i,...j->...ij", np.asarray(white, "float64"), np.asarray(white, "float64"))
    lower = np.linalg.cholesky(SIGMA)
    np.testing.assert_allclose(
        lower @ gram @ lower.T, np.einsum("...i,...j->...ij", V, V), atol=100 * rtol
    )
    np.testing.assert_allclose(ellipsoid.norm(state, v[0, 0]), norms[0, 0], rtol=rtol)


def test_stream_equals_batch_and_merge(x64):
    """A scan over chunks, and two halves merged, are the ellipsoid of the whole."""
    z, w = jnp.array(Z), jnp.array(WEIGHTS)
    start = ellipsoid.init(DIM, ridge=RIDGE)

    def step(state, chunk):
        return ellipsoid.update(state, chunk[0], weights=chunk[1]), None

    stream, _ = jax.jit(lambda s, xs: jax.lax.scan(step, s, xs))(
        start, (z.reshape(4, 4, DIM), w.reshape(4, 4))
    )
    np.testing.assert_allclose(stream.precision, SIGMA, rtol=1e-14)
    online = ellipsoid.update(ellipsoid.init(DIM, ridge=9.0), z[6:], weights=w[6:])
    merged = ellipsoid.merge(ellipsoid.update(start, z[:6], weights=w[:6]), online)
    np.testing.assert_allclose(merged.precision, SIGMA, rtol=1e-13)
    assert merged.ridge == RIDGE


@given(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
def test_weight_zero_is_deletion(mask):
    """Also where the deleted rows hold NaN, and as a boolean mask."""
    keep = np.array(mask)
    start = ellipsoid.init(DIM, ridge=RIDGE)
    z = jnp.array(np.where(keep[:, None], Z, np.nan), "float32")
    masked = ellipsoid.update(start, z, weights=jnp.array(keep))
    expected = RIDGE * np.eye(DIM) + Z[keep].T @ Z[keep]
    np.testing.assert_allclose(masked.precision, expected, rtol=1e-5, atol=1e-5)
    scaled = ellipsoid.update(start, z, weights=jnp.array(2.0 * keep, "float32"))
    doubled = 2 * expected - RIDGE * np.eye(DIM)
    np.testing.assert_allclose(scaled.precision, doubled, rtol=1e-5, atol=1e-5)


def test_gradients(x64):
    state = build("float64")

    def total(z, v):
        updated = ellipsoid.update(state, z)
        return jnp.sum(ellipsoid.norm(updated, v)) + ellipsoid.log_det(updated)

    check_grads(jax.jit(total), (jnp.array(Z[:2]), jnp.array(V[0, :2])), order=1, rtol=1e-6)
    at_zero = jax.grad(lambda v: ellipsoid.norm(state, v))(jnp.zeros(DIM))
    assert jnp.all(at_zero == 0)
    deleted = jax.grad(
        lambda z: ellipsoid.log_det(ellipsoid.update(state, z, weights=jnp.array([0.0, 1.0])))
    )(jnp.array(Z[:2]))
    assert jnp.all(deleted[0] == 0)
    assert jnp.any(deleted[1] != 0)


def test_dimension_1024(x64):
    """float32, streamed in blocks, condition number about 400, against Woodbury in float64."""
    rng = np.random.default_rng(22)
    dim, rows = 1024, 128
    z = rng.normal(size=(rows, dim)) / np.sqrt(dim)
    v = rng.normal(size=(2, dim))
    state = ellipsoid.init(dim, ridge=0.01, dtype="float32")
    for block in np.split(z, 2):
        state = ellipsoid.update(state, jnp.array(block, "float32"))
    seen = z @ v.T
    explained = np.sum(seen * np.linalg.solve(0.01 * np.eye(rows) + z @ z.T, seen), axis=0)
    expected = np.sqrt((np.sum(v**2, axis=1) - explained) / 0.01)
    np.testing.assert_allclose(ellipsoid.norm(state, jnp.array(v, "float32")), expected, rtol=1e-4)


def test_rotation_leaves_norms_alone(x64):
    rotation = np.linalg.qr(RNG.normal(size=(DIM, DIM)))[0]
    turned = ellipsoid.update(
        ellipsoid.init(DIM, ridge=RIDGE), jnp.array(Z @ rotation), weights=jnp.array(WEIGHTS)
    )
    np.testing.assert_allclose(
        ellipsoid.norm(turned, jnp.array(V @ rotation)),
        ellipsoid.norm(build("float64"), jnp.array(V)),
        rtol=1e-12,
    )


def test_vmap_over_seeds_and_eight_devices():
    """A batch of ellipsoids under vmap; rows and directions sharded over eight devices."""

    def run(z, v):
        state = ellipsoid.update(ellipsoid.init(DIM, ridge=RIDGE), z)
        return state.precision, ellipsoid.norm(state, v), ellipsoid.log_det(state)

    z, v = jnp.array(Z, "float32"), jnp.array(V, "float32").reshape(10, DIM)[:8]
    alone = run(z, v)
    stacked = jax.jit(jax.vmap(run))(jnp.stack([z, 2 * z]), jnp.stack([v, v]))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.jit(run)(jax.device_put(z, rows), jax.device_put(v, rows))
    for single, many, spread in zip(alone, stacked, sharded, strict=True):
        np.testing.assert_allclose(many[0], single, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(spread, single, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
        stacked[0][1], RIDGE * np.eye(DIM) + 4 * Z.T @ Z, rtol=1e-5, atol=1e-5
    )


def test_wrong_facts():
    with pytest.raises(ValueError, match="dim must be at least 1"):
        ellipsoid.init(0, ridge=1.0)
    with pytest.raises(ValueError, match="ridge must be > 0"):
        ellipsoid.init(2, ridge=0.0)


@pytest.mark.parametrize("dim", [64, 65])
def test_solve_on_both_sides_of_the_size_where_lapack_begins(dim, x64):
    """Sigma without symmetries: a factor in the place of its transpose shows."""
    rng = np.random.default_rng(dim)
    z = rng.normal(size=(2 * dim, dim)) * np.linspace(0.2, 2, dim)
    state = ellipsoid.update(ellipsoid.init(dim, ridge=0.3), jnp.array(z))
    v = rng.normal(size=(2, 3, dim))
    want = np.linalg.solve(0.3 * np.eye(dim) + z.T @ z, v.reshape(-1, dim).T).T.reshape(v.shape)
    np.testing.assert_allclose(ellipsoid.solve(state, jnp.array(v)), want, rtol=1e-9, atol=1e-12)
