r"""Descent in a given metric: for objectives that are not convex, or whose Hessian is costly.

.. math:: \theta \leftarrow \theta - t\, G(\theta)^{-1} \nabla F(\theta)

with t the best of a grid of lengths. With the Hessian for G that is Newton's method; with the
information of a likelihood (Gauss-Newton, Fisher scoring) G is positive definite whatever F is.

Axes: ``dim`` (parameters).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_klrlhf.core import linalg, numerics


class Descended(NamedTuple):
    """Where descent ended, whether nothing is left to gain there, and the steps it took."""

    theta: Float[Array, " dim"]
    converged: Bool[Array, ""]
    iterations: Int[Array, ""]


def descend(
    objective: Callable[[Array], Array],
    metric: Callable[[Array], Array],
    start: Float[Array, " dim"],
    *,
    iterations: int = 40,
) -> Descended:
    """The minimum of ``objective`` that descent in ``metric`` reaches from ``start``.

    It ends when no length lowers the objective, or after ``iterations``, and has converged if the
    step then is below the square root of the objective's rounding: a stationary point, no proof of
    a global minimum.
    """
    dtype = start.dtype
    lengths = jnp.asarray(np.append(2.0 ** -np.arange(-2.0, 12.0), 0.0), dtype)
    tolerance = jnp.sqrt(jnp.finfo(dtype).eps)

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        theta, _, _, taken = state
        gradient = jax.grad(objective)(theta)
        direction = linalg.inverse(metric(theta)) @ gradient
        values = jax.vmap(lambda length: objective(theta - length * direction))(lengths)
        # 0 is the last length and argmin takes the first: a tie moves, only a rise stops.
        length = lengths[jnp.argmin(values)]
        decrement = numerics.safe_sqrt(gradient @ direction)
        small = decrement <= tolerance * (1 + jnp.sqrt(jnp.abs(values[-1])))
        stuck = length == 0
        # So near the end values are rounding, and the step is better than any comparison of them.
        length = jnp.where(small, 1, length)
        return theta - length * direction, small | stuck, small, taken + 1

    def unfinished(state: tuple[Array, Array, Array, Array]) -> Array:
        return ~state[1] & (state[3] < iterations)

    begin = (start, jnp.zeros((), bool), jnp.zeros((), bool), jnp.zeros((), jnp.int32))
    theta, _, converged, taken = jax.lax.while_loop(unfinished, step, begin)
    return Descended(theta, converged, taken)
