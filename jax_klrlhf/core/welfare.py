r"""Several people, groups or objectives at once: who is worst off, how equal, how far.

Axes: ``batch`` (free), ``people`` (or groups; last), ``points``, ``objectives``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jax_klrlhf.core.numerics import Scalar


def gini(values: Float[Array, "*batch people"]) -> Float[Array, "*batch"]:
    r"""Gini :math:`\sum_{ij} |v_i - v_j| / (2 n^2 \bar v)`: 0 equal, near 1 one has all.

    Values must be >= 0 with a true zero (win rates, probabilities): a reward has no origin
    of its own, nor would its Gini have a meaning.

    >>> float(gini(jnp.array([0.0, 0.0, 3.0])))  # 4 * 3 / (2 * 9 * 1)
    0.666...
    """
    apart = jnp.abs(values[..., :, None] - values[..., None, :])
    mean = jnp.mean(values, -1)
    positive = mean > 0
    return jnp.where(positive, jnp.mean(apart, (-2, -1)) / (2 * jnp.where(positive, mean, 1)), 0)


def worst_share(values: Float[Array, "*batch people"], *, share: Scalar) -> Float[Array, "*batch"]:
    """Mean of the worst ``share`` of the people: a decile at 0.1, the worst one near 0.

    A fraction of a person counts as that fraction; all of them at 1, the mean.

    >>> float(worst_share(jnp.array([4.0, 1.0, 2.0, 9.0]), share=0.5))
    1.5
    """
    n = values.shape[-1]
    order = jnp.sort(values, -1)
    count = jnp.maximum(jnp.asarray(share, values.dtype) * n, jnp.finfo(values.dtype).eps)
    weight = jnp.clip(count - jnp.arange(n, dtype=values.dtype), 0, 1)
    return jnp.sum(order * weight.reshape((1,) * (order.ndim - 1) + (n,)), -1) / jnp.sum(weight)


def dominated(points: Float[Array, "*batch points objectives"]) -> Bool[Array, "*batch points"]:
    """True where another point is at least as good in every objective and better in one."""
    other, one = points[..., None, :, :], points[..., :, None, :]
    return jnp.any(jnp.all(other >= one, -1) & jnp.any(other > one, -1), -1)


def hypervolume(
    points: Float[Array, "points objectives"], reference: Float[Array, " objectives"]
) -> Float[Array, ""]:
    r"""Volume that the points dominate above ``reference`` (all objectives are to be large).

    Exact, by sweeping one objective after the other: points^(objectives - 1) work.

    >>> float(hypervolume(jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.zeros(2)))  # 2 + 2 - 1
    3.0
    """
    return _volume(jnp.maximum(points - reference[None], 0), jnp.ones(points.shape[0], bool))


def _volume(points: Array, keep: Array) -> Array:
    height = jnp.where(keep, points[:, -1], 0)
    if points.shape[-1] == 1:
        return jnp.max(height)
    order = jnp.argsort(-height)
    height, points, keep = height[order], points[order], keep[order]
    step = height - jnp.append(height[1:], 0)
    upto = jnp.tril(jnp.ones((keep.size, keep.size), bool)) & keep[None, :]
    area = jax.vmap(lambda mask: _volume(points[:, :-1], mask))(upto)
    return jnp.sum(step * area)


def r2(
    points: Float[Array, "points objectives"],
    weights: Float[Array, "directions objectives"],
    ideal: Float[Array, " objectives"],
) -> Float[Array, ""]:
    r"""R2 indicator: mean over directions of the least weighted Chebyshev distance to ``ideal``.

    .. math:: \frac{1}{|W|} \sum_w \min_p \max_k w_k |z_k - p_k|

    Smaller is better; 0 where a point is ideal. Source: Hansen and Jaszkiewicz (1998).
    """
    distance = jnp.abs(ideal[None] - points)
    weighted = jnp.max(weights[:, None, :] * distance[None], -1)
    return jnp.mean(jnp.min(weighted, -1))
