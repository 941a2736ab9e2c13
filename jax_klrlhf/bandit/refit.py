r"""Bradley-Terry maximum likelihood, refitted from where the last fit stopped.

.. math:: F(\theta) = \sum_i -w_i \log\sigma(m_i) - l_i \log\sigma(-m_i)
          + \tfrac{\text{ridge}}{2}\|\theta\|^2, \qquad m_i = \langle\theta, z_i\rangle

The optimum is that of :func:`jax_klrlhf.core.estimation.fit`. This is its inner loop for
simulations, where one problem is shared by hundreds of seeds: comparisons come counted (wins w,
losses l), the previous estimate is close, and :func:`gram` computes the Hessians of all seeds as
one matrix product.

Axes: ``rows`` (weighted comparisons), ``dim``, ``seeds`` (whatever axis is mapped).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from jax_klrlhf.core import bradley_terry, linalg
from jax_klrlhf.core.numerics import Scalar

_HIGHEST = lax.Precision.HIGHEST


class Fit(NamedTuple):
    """The estimate; whether it is the optimum to rounding; steps taken and Hessians formed."""

    theta: Float[Array, " dim"]
    converged: Bool[Array, ""]
    iterations: Int[Array, ""]
    hessians: Int[Array, ""]


@custom_vmap
def gram(
    differences: Float[Array, "rows dim"], weights: Float[Array, " rows"]
) -> Float[Array, "dim dim"]:
    r""":math:`\sum_i w_i z_i z_i^\top`, for weights that may be mapped where z is not.

    Mapped over seeds that share the differences, the products z z' are formed once and all sums
    are one ``[seeds, rows] x [rows, dim (dim + 1) / 2]`` product: on CPU about ten times faster at
    256 seeds and dim 16 than what `vmap` makes of the plain formula, an array of weighted
    differences ``[seeds, rows, dim]`` that has to be written out first.
    """
    weighted = weights[:, None] * differences
    return jnp.matmul(weighted.T, differences, precision=_HIGHEST)


@gram.def_vmap
def _gram_of_many(axis_size, in_batched, differences, weights):
    shared_differences, shared_weights = (not batched for batched in in_batched)
    if not shared_differences or shared_weights:
        plain = jax.vmap(gram.fun, in_axes=[0 if batched else None for batched in in_batched])
        return plain(differences, weights), True
    dim = differences.shape[-1]
    row, column = np.triu_indices(dim)
    products = differences[:, row] * differences[:, column]
    sums = jnp.matmul(weights, products, precision=_HIGHEST)
    position = np.zeros((dim, dim), np.int32)
    position[row, column] = position[column, row] = np.arange(len(row))
    return sums[:, position.reshape(-1)].reshape(axis_size, dim, dim), True


def newton(
    differences: Float[Array, "rows dim"],
    wins: Float[Array, " rows"],
    losses: Float[Array, " rows"],
    start: Float[Array, " dim"],
    *,
    ridge: Scalar,
    max_iterations: int = 50,
) -> Fit:
    r"""Minimize F from ``start`` by Newton's method; ``ridge`` must be positive.

    A Hessian, the costly part, serves several steps. Let m be the largest change of any margin. The
    first step has the length :math:`\log(1 + m) / m`, which lowers F without a line search (Sun and
    Tran-Dinh, arXiv 1703.04599, order 2) and tends to 1. After margins drifted by no more than D in
    all, no curvature has changed by more than a factor :math:`e^D`; so full steps with the old
    Hessian H lower F as long as :math:`D < \log 2`, each brings the optimum closer by a factor of
    about D, and a new Hessian is formed when they don't suffice. It ends when ``m D`` is at the
    rounding of a margin: what is left is smaller.

    ``max_iterations`` is the number of Hessians.
    """
    dim, dtype = differences.shape[-1], differences.dtype
    ridge = jnp.asarray(ridge, dtype)
    eps = float(jnp.finfo(dtype).eps)
    count = wins + losses

    def from_hessian(state: tuple[Array, ...]) -> tuple[Array, ...]:
        theta, _, iterations, hessians = state
        margin = jnp.matmul(differences, theta, precision=_HIGHEST)
        hessian = gram(differences, count * bradley_terry.curvature(margin))
        inverse = linalg.inverse(hessian + ridge * jnp.eye(dim, dtype=dtype))

        def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
            theta, margin, drift, taken, _, _ = state
            slope = count * jax.nn.sigmoid(margin) - wins
            gradient = jnp.matmul(slope, differences, precision=_HIGHEST) + ridge * theta
            direction = jnp.matmul(inverse, gradient, precision=_HIGHEST)
            change = jnp.matmul(differences, direction, precision=_HIGHEST)
            size = jnp.max(jnp.abs(change), initial=0)
            first = taken == 0
            damped = jnp.where(size > 0, jnp.log1p(size) / jnp.where(size > 0, size, 1), 1)
            safe = drift + size <= REACH
            length = jnp.where(first, damped, jnp.where(safe, 1, 0))
            drift = drift + length * size
            largest = jnp.max(jnp.abs(margin), initial=0)
            done = (first | safe) & (size * drift <= eps * (1 + largest))
            more = ~done & (first | safe) & (drift < REACH) & (taken < STEPS - 1)
            return (
                theta - length * direction, margin - length * change, drift, taken + 1, done, more
            )  # fmt: skip

        no, zero = jnp.zeros((), bool), jnp.zeros((), jnp.int32)
        begin = (theta, margin, jnp.zeros((), dtype), zero, no, ~no)
        theta, _, _, taken, done, _ = lax.while_loop(lambda state: state[-1], step, begin)
        return theta, done, iterations + taken, hessians + 1

    def unfinished(state: tuple[Array, ...]) -> Array:
        _, done, _, hessians = state
        return ~done & (hessians < max_iterations)

    zero = jnp.zeros((), jnp.int32)
    return Fit(*lax.while_loop(unfinished, from_hessian, (start, zero > 0, zero, zero)))


REACH = 0.69
"""Largest drift of a margin, just below log 2, within which a Hessian is trusted."""

STEPS = 8
"""Most steps with one Hessian."""
