r"""The confidence ellipsoid of a linear reward: what the data have not yet pinned down.

.. math:: \Sigma = \lambda I + \sum_i w_i z_i z_i^\top, \qquad
          \|v\|_{\Sigma^{-1}} = \sqrt{v^\top \Sigma^{-1} v} = \|L^{-1} v\|, \quad \Sigma = L L^\top

The norm of a feature difference v is the width, per unit of radius, of the confidence interval of
its reward difference <theta, v>. Source: Xiong et al. (arXiv 2312.11456), section 3.

Every Gram matrix and factor is at `Precision.HIGHEST`. In float32 a factor is sound while
(largest eigenvalue) / ridge stays below about 1 / (dim eps), that is 10^4 at dim = 1024; beyond,
norms can be NaN: raise the ridge or use float64.

Axes: ``n`` (directions, e.g. comparisons), ``dim`` (features).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from jax_klrlhf.core import linalg
from jax_klrlhf.core.numerics import Scalar, safe_sqrt

_HIGHEST = lax.Precision.HIGHEST


class Ellipsoid(NamedTuple):
    """`precision [dim, dim]` is Sigma, `ridge []` the lambda it began with."""

    precision: Float[Array, "dim dim"]
    ridge: Float[Array, ""]


def init(dim: int, *, ridge: Scalar, dtype: DTypeLike | None = None) -> Ellipsoid:
    """No data: Sigma = ridge I. `dtype` defaults to JAX's default float.

    Raises:
      ValueError: if dim < 1 or ridge <= 0 (the norm of a direction without data is 1/sqrt(ridge)).
    """
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if isinstance(ridge, (int, float)) and not ridge > 0:
        raise ValueError(f"ridge must be > 0, got {ridge}: Sigma must be invertible without data")
    ridge = jnp.asarray(ridge, float if dtype is None else dtype)
    return Ellipsoid(precision=ridge * jnp.eye(dim, dtype=ridge.dtype), ridge=ridge)


def update(
    state: Ellipsoid,
    directions: Float[Array, "n dim"],
    *,
    weights: Shaped[Array, " n"] | None = None,
) -> Ellipsoid:
    """Add sum_i w_i z_i z_i^T.

    `weights` are w_i >= 0, or booleans; a row of weight 0 is deleted: nothing in it is read.
    Updates commute and add up, so a stream gives the ellipsoid of its whole.

    >>> state = update(init(1, ridge=1.0), jnp.array([[1.0], [2.0]]))
    >>> float(state.precision[0, 0])  # 1 + 1 + 4
    6.0
    """
    weighted = directions
    if weights is not None:
        keep = (weights > 0 if weights.dtype != jnp.bool_ else weights)[:, None]
        directions = jnp.where(keep, directions, 0.0)
        weighted = directions * jnp.where(keep, weights.astype(directions.dtype)[:, None], 0.0)
    gram = jnp.matmul(weighted.T, directions, precision=_HIGHEST)
    return state._replace(precision=state.precision + gram)


def merge(first: Ellipsoid, second: Ellipsoid) -> Ellipsoid:
    """The ellipsoid of both data sets, with the ridge of `first` (that of `second` is taken out).

    Hybrid learning: Sigma_off+on from an offline and an online ellipsoid (arXiv 2312.11456).
    """
    identity = jnp.eye(first.precision.shape[-1], dtype=first.precision.dtype)
    added = second.precision - second.ridge * identity
    return first._replace(precision=first.precision + added)


def factor(state: Ellipsoid) -> Float[Array, "dim dim"]:
    """Lower Cholesky factor L, Sigma = L L^T."""
    return jnp.linalg.cholesky(state.precision)


def whiten(state: Ellipsoid, directions: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """L^{-1} v: coordinates in which ||.||_{Sigma^{-1}} is the Euclidean norm."""
    flat = directions.reshape(-1, directions.shape[-1])
    if flat.shape[-1] <= linalg.SMALL:
        white = linalg.inverse_factor(state.precision)
        return jnp.matmul(flat, white.T, precision=_HIGHEST).reshape(directions.shape)
    white = lax.linalg.triangular_solve(factor(state), flat.T, left_side=True, lower=True)
    return white.T.reshape(directions.shape)


def solve(state: Ellipsoid, directions: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Sigma^{-1} v."""
    flat = directions.reshape(-1, directions.shape[-1])
    if flat.shape[-1] <= linalg.SMALL:
        white = linalg.inverse_factor(state.precision)
        half = jnp.matmul(flat, white.T, precision=_HIGHEST)
        return jnp.matmul(half, white, precision=_HIGHEST).reshape(directions.shape)
    lower = factor(state)
    white = lax.linalg.triangular_solve(lower, flat.T, left_side=True, lower=True)
    out = lax.linalg.triangular_solve(lower, white, left_side=True, lower=True, transpose_a=True)
    return out.T.reshape(directions.shape)


def norm(state: Ellipsoid, directions: Float[Array, "*batch dim"]) -> Float[Array, "*batch"]:
    """||v||_{Sigma^{-1}}, by one Cholesky factorization for all directions.

    The gradient at v = 0 (two identical responses) is 0, a subgradient.

    >>> float(norm(init(2, ridge=4.0), jnp.array([0.0, 3.0])))  # 3 / sqrt(4)
    1.5
    """
    return safe_sqrt(jnp.sum(whiten(state, directions) ** 2, axis=-1))


def log_det(state: Ellipsoid) -> Float[Array, ""]:
    """log det Sigma.

    >>> round(float(log_det(init(3, ridge=2.0))), 4)  # 3 log 2
    2.0794
    """
    return 2.0 * jnp.sum(jnp.log(jnp.diagonal(factor(state))))
