r"""Inverses of small positive definite matrices, without LAPACK, and what is made of them.

Simulations solve thousands of systems of a few dozen unknowns at once, one for every seed. LAPACK's
batches are no good for that: a call for every matrix and, in jaxlib 0.10 on a CPU, a *deadlock*.
There a batch waits for threads of the pool that it runs on; where several devices have one program,
they take all threads and wait for ever (seen at 16 unknowns and 64 seeds a device in
``triangular_solve``, at 256 in ``cho_solve``; jaxlib 0.12 runs batches in line and is free of it).
So up to :data:`SMALL` unknowns everything here is elementwise, and LAPACK is used beyond.

Axes: ``dim``.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

SMALL = 64
"""Largest dimension that is solved without LAPACK."""

UNROLLED = 24
"""Largest dimension whose sweeps are written out: ten times faster on CPU, slower to compile."""


@custom_vmap
def inverse(matrix: Float[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    """The inverse of a symmetric positive definite matrix, by Gauss-Jordan sweeps.

    A sweep needs no pivots here, and its error is like Cholesky's. Under `vmap` the mapped axis is
    the last in memory, so that every operation runs over the matrices side by side. Not for
    reverse-mode differentiation: for that there is :func:`inverse_factor`.
    """
    return inverse_of_many(matrix[..., None])[..., 0]


@inverse.def_vmap
def _inverse_mapped(axis_size, in_batched, matrices):
    del axis_size, in_batched
    return jnp.moveaxis(inverse_of_many(jnp.moveaxis(matrices, 0, -1)), -1, 0), True


def inverse_of_many(matrices: Float[Array, "dim dim many"]) -> Float[Array, "dim dim many"]:
    """:func:`inverse` of matrices that lie side by side in the last axis."""
    dim = matrices.shape[0]
    if dim > SMALL:
        factor = jnp.linalg.cholesky(jnp.moveaxis(matrices, -1, 0))
        identity = jnp.broadcast_to(jnp.eye(dim, dtype=factor.dtype), factor.shape)
        return jnp.moveaxis(jax.scipy.linalg.cho_solve((factor, True), identity), 0, -1)
    return _swept(matrices)


def _swept(matrix: Float[Array, "dim dim many"]) -> Float[Array, "dim dim many"]:
    dim = matrix.shape[0]
    index = jnp.arange(dim)

    def sweep(step: int | Array, swept: Array) -> Array:
        row = lax.dynamic_index_in_dim(swept, step, 0, keepdims=False)
        pivot = 1 / lax.dynamic_index_in_dim(row, step, 0, keepdims=True)
        here = (index == step)[:, None]
        scaled = jnp.where(here, -pivot, row * pivot)
        edge = jnp.where(here[:, None], scaled[None], scaled[:, None])
        return jnp.where(here[:, None] | here[None], edge, swept - row[:, None] * scaled[None])

    if dim > UNROLLED:
        return -lax.fori_loop(0, dim, sweep, matrix)
    for step in range(dim):
        matrix = sweep(step, matrix)
    return -matrix


def inverse_factor(matrix: Float[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    r""":math:`L^{-1}` of the Cholesky factor, :math:`A = L L^\top`; lower triangular.

    NaN where the matrix isn't positive definite. Differentiable in either mode.

    >>> inverse_factor(jnp.array([[4.0, 0.0], [0.0, 25.0]])).tolist()
    [[0.5, 0.0], [0.0, 0.20000000298023224]]
    """
    dim = matrix.shape[-1]
    identity = jnp.eye(dim, dtype=matrix.dtype)
    if dim > SMALL:
        return lax.linalg.triangular_solve(
            jnp.linalg.cholesky(matrix), identity, left_side=True, lower=True
        )
    index = jnp.arange(dim)

    def eliminate(step: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, right = state
        below = index > step
        row = lax.dynamic_index_in_dim(left, step, 0, keepdims=False)
        pivot = lax.dynamic_index_in_dim(row, step, 0, keepdims=False)
        column = lax.dynamic_index_in_dim(left, step, 1, keepdims=False)
        factor = jnp.where(below, column / pivot, 0)[:, None]
        there = lax.dynamic_index_in_dim(right, step, 0, keepdims=False)
        return left - factor * row[None], right - factor * there[None]

    upper, unit = lax.fori_loop(0, dim - 1, eliminate, (matrix, identity))
    return unit * lax.rsqrt(jnp.diagonal(upper))[:, None]


def ball_minimum(
    model: Float[Array, "dim dim"],
    target: Float[Array, " dim"],
    bound: Array | float,
    multiplier: Array | float = 0.0,
) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
    r"""Minimize the quadratic :math:`\tfrac12 t^\top M t - b^\top t` over ||t|| <= bound.

    t(mu) = (M + mu I)^{-1} b. Newton on 1/||t(mu)|| = 1/bound, which is concave in mu: from either
    side one step lands at or below the root and the rest rise to it (Moré & Sorensen, 1983), from
    ``multiplier``. Returns t and its multiplier mu.
    """
    identity = jnp.eye(target.shape[0], dtype=target.dtype)
    tolerance = 4 * jnp.finfo(target.dtype).eps

    def at(mu):
        white = inverse_factor(model + mu * identity)
        point = white.T @ (white @ target)
        half = white @ point
        square = point @ point
        excess = jnp.sqrt(square) / bound - 1.0
        slope = half @ half
        change = excess * square / jnp.where(slope > 0, slope, 1.0)
        done = (jnp.abs(excess) <= tolerance) | ((mu <= 0) & (excess <= 0))
        return point, change, done

    def body(carry):
        mu, _, change, _, count = carry
        mu = jnp.maximum(mu + change, 0.0)
        point, change, done = at(mu)
        return mu, point, change, done, count + 1

    # The root is not below this, as M is at most its trace; without it t(0) of a nearly singular M
    # may overflow.
    least = jnp.linalg.norm(target) / bound - jnp.trace(model)
    multiplier = jnp.maximum(jnp.asarray(multiplier, target.dtype), least)
    point, change, done = at(multiplier)
    first = (multiplier, point, change, done, jnp.array(0, jnp.int32))
    mu, point, _, _, _ = lax.while_loop(lambda c: ~c[3] & (c[4] < 40), body, first)
    return project(point, bound), mu


def project(point: Float[Array, " dim"], bound: Array | float) -> Float[Array, " dim"]:
    """Nearest point of the ball ||t|| <= bound; the gradient is finite at 0.

    >>> project(jnp.array([3.0, 4.0]), 1.0).tolist()
    [0.6..., 0.8...]
    """
    square = jnp.sum(point**2)
    outside = square > bound**2
    return jnp.where(outside, bound * lax.rsqrt(jnp.where(outside, square, 1.0)), 1.0) * point
