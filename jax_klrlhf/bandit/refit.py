r"""Bradley-Terry maximum likelihood, refitted from where the last fit stopped.

.. math:: f(\theta) = \sum_i -w_i \log\sigma(m_i) - l_i \log\sigma(-m_i)
          + \tfrac{\text{ridge}}{2}\|\theta\|^2, \qquad m_i = \langle\theta, z_i\rangle

:func:`jax_klrlhf.core.estimation.fit` starts from zero with a fixed budget. Inside a simulation
the last estimate is close and the wins ``w`` and losses ``l`` come counted, so two or three
Newton steps do; they stop when the next one would be below ``tolerance``.

Axes: ``rows`` (weighted comparisons), ``dim``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_klrlhf.core import bradley_terry
from jax_klrlhf.core.numerics import Scalar


class Fit(NamedTuple):
    """The estimate; whether the last step was below the tolerance; Newton steps taken."""

    theta: Float[Array, " dim"]
    converged: Bool[Array, ""]
    iterations: Int[Array, ""]


def newton(
    differences: Float[Array, "rows dim"],
    wins: Float[Array, " rows"],
    losses: Float[Array, " rows"],
    start: Float[Array, " dim"],
    *,
    ridge: Scalar,
    max_iterations: int = 50,
) -> Fit:
    r"""Minimize the ridge-penalized likelihood by damped Newton steps from ``start``.

    Step lengths :math:`\log(1 + d) / d` with :math:`d = \max_i \|z_i\| \|p\|` for the Newton
    direction p: global convergence without a line search (Sun and Tran-Dinh, arXiv 1703.04599,
    for generalized self-concordant functions of order 2), and full steps in the limit. With
    ``ridge > 0`` there is always a minimum, separable data included. The tolerance on the step is
    relative, 1e-5 in float32 and 1e-10 in float64, and convergence is quadratic.
    """
    dim, dtype = differences.shape[-1], differences.dtype
    ridge = jnp.asarray(ridge, dtype)
    tolerance = 1e-5 if jnp.finfo(dtype).bits < 64 else 1e-10
    count = wins + losses
    reach = jnp.sqrt(jnp.max(jnp.sum(differences**2, -1), initial=0))

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        theta, _, iterations = state
        margin = differences @ theta
        slope = count * jax.nn.sigmoid(margin) - wins
        gradient = slope @ differences + ridge * theta
        curvature = count * bradley_terry.curvature(margin)
        hessian = (curvature[:, None] * differences).T @ differences + ridge * jnp.eye(
            dim, dtype=dtype
        )
        direction = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(hessian), True), gradient)
        length = jnp.sqrt(jnp.sum(direction**2))
        size = reach * length
        damping = jnp.where(size > 0, jnp.log1p(size) / jnp.where(size > 0, size, 1), 1)
        done = length <= tolerance * (1 + jnp.sqrt(jnp.sum(theta**2)))
        return theta - damping * direction, done, iterations + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, done, iterations = state
        return ~done & (iterations < max_iterations)

    begin = (start, jnp.zeros((), bool), jnp.zeros((), jnp.int32))
    theta, done, iterations = jax.lax.while_loop(unfinished, step, begin)
    return Fit(theta, done, iterations)
