r"""Smooth convex minimization over the simplex or the positive cone, by a damped barrier Newton.

.. math:: \min_w f(w) - \mu \sum_i \log w_i, \qquad \mu \downarrow

A step is computed in the scaled variable u = dw / w, where the barrier's Hessian is mu I whatever
w is, so that float32 reaches the corners. Its length is the best of a grid that holds the one that
self-concordance allows, the logarithm's and f's own: full steps leave the path at small KL
coefficients, and where values are compared at the level of rounding that one alone is safe.

Axes: ``members``.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_klrlhf.core import linalg
from jax_klrlhf.core.numerics import Scalar


class Model(NamedTuple):
    """A convex function at a point, to second order."""

    value: Float[Array, ""]
    gradient: Float[Array, " members"]
    hessian: Float[Array, "members members"]
    change: Callable[[Float[Array, " members"]], Float[Array, ""]]
    """``change(step)``: at most how much, as a log-factor, the curvature changes along a step."""


class Minimum(NamedTuple):
    """Where the last barrier is minimized, and the Newton steps spent."""

    weight: Float[Array, " members"]
    iterations: Int[Array, ""]


def minimize(
    model: Callable[[Float[Array, " members"], Float[Array, ""]], Model],
    start: Float[Array, " members"],
    *,
    barrier: Scalar,
    last_barrier: Scalar,
    normalized: bool = True,
    tolerance: Scalar = 0.25,
    slack_of_gap: Scalar = 0.0,
    exact_below: Scalar = 0.0,
    max_iterations: int = 300,
) -> Minimum:
    """Minimize over the simplex (``normalized``) or over w >= 0, following the barrier down.

    ``model(weight, mu)`` may be a smoother function while mu is large, f itself at the end.

    ``barrier`` is mu at the start, ``last_barrier`` at the end (the same: one fixed barrier, which
    is a Dirichlet prior of concentration 1 + mu). At the end w_i times its slack is about mu, so
    the duality gap is about ``members * last_barrier``. ``tolerance`` is the last step's Newton
    decrement in units of sqrt(mu): a small one where mu is not. ``slack_of_gap`` is what rounding
    adds to the gap and no step takes away. Where mu <= ``exact_below``, and at the
    last barrier, the model is f itself: of those points the one with the least gap is returned.
    """
    members = start.shape[0]
    dtype = start.dtype
    eps = jnp.finfo(dtype).eps
    last = jnp.asarray(last_barrier, dtype)
    exact_below = jnp.maximum(jnp.asarray(exact_below, dtype), last)
    identity = jnp.eye(members, dtype=dtype)

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        weight, mu, _, iterations, best_gap, best_weight = state
        here = model(weight, mu)
        gradient = weight * here.gradient - mu
        curvature = weight[:, None] * here.hessian * weight[None, :] + mu * identity
        move = newton_move(weight, gradient, curvature, normalized=normalized)
        decrement = jnp.sqrt(jnp.maximum(move @ (curvature @ move), 0) / mu)
        size = here.change(weight * move)
        own = jnp.where(size > eps, jnp.log1p(size) / jnp.where(size > eps, size, 1), 1)
        safe = jnp.minimum(jnp.where(decrement > 0.25, 1 / (1 + decrement), 1), own)
        # A step keeps w positive.
        most = 0.9 / jnp.maximum(jnp.max(-move), 0.9)
        lengths = jnp.minimum(jnp.append(2.0 ** -jnp.arange(6, dtype=dtype), safe), most)

        def merit(length: Array) -> Array:
            # The barrier's change by itself: beside the value it would be lost in float32.
            barrier = -mu * jnp.sum(jnp.log1p(length * move))
            return model(weight * (1 + length * move), mu).value - here.value + barrier

        merits = jax.vmap(merit)(lengths)
        least = jnp.argmin(merits)
        sure = merits[least] < -16 * eps * (jnp.abs(here.value) + mu)
        length = jnp.where(sure, lengths[least], jnp.minimum(safe, most))
        # The complementarity of w and its slack certifies this point, if the model is f itself.
        slack = here.gradient - (jnp.min(here.gradient) if normalized else 0)
        gap = jnp.abs(weight @ slack) + jnp.maximum(-jnp.min(slack), 0)
        better = (mu <= exact_below) & (gap < best_gap)
        best_gap, best_weight = (
            jnp.where(better, new, old) for new, old in ((gap, best_gap), (weight, best_weight))
        )
        weight = weight * (1 + length * move)
        if normalized:
            weight = weight / jnp.sum(weight)
        centred = decrement < 0.25
        finished = (
            (mu <= last) & (decrement < tolerance) & (best_gap <= 2 * members * last + slack_of_gap)
        )
        mu = jnp.where(centred, jnp.maximum(0.3 * mu, last), mu)
        return weight, mu, finished, iterations + 1, best_gap, best_weight

    def unfinished(state: tuple[Array, ...]) -> Array:
        return ~state[2] & (state[3] < max_iterations)

    mu = jnp.maximum(jnp.asarray(barrier, dtype), last)
    none = jnp.asarray(jnp.inf, dtype)
    first = (start, mu, jnp.zeros((), bool), jnp.zeros((), jnp.int32), none, start)
    weight, _, _, iterations, best_gap, best_weight = lax.while_loop(unfinished, step, first)
    return Minimum(jnp.where(jnp.isfinite(best_gap), best_weight, weight), iterations)


def newton_move(
    weight: Float[Array, " members"],
    gradient: Float[Array, " members"],
    curvature: Float[Array, "members members"],
    *,
    normalized: bool,
) -> Float[Array, " members"]:
    """Newton's move in u = dw / w, along which sum w stays what it is where ``normalized``."""
    dtype = weight.dtype
    eps, tiny = jnp.finfo(dtype).eps, jnp.finfo(dtype).tiny
    jitter = eps * jnp.trace(curvature) + tiny
    white = linalg.inverse_factor(curvature + jitter * jnp.eye(weight.shape[0], dtype=dtype))
    solve = lambda v: white.T @ (white @ v)  # noqa: E731
    along = solve(weight)

    def newton(gradient: Array) -> Array:
        move = -solve(gradient)
        if not normalized:
            return move
        return move - along * (weight @ move) / jnp.maximum(weight @ along, tiny)

    # One refinement: in float32 the solve alone loses the flat directions.
    move = newton(gradient)
    return move + newton(gradient + curvature @ move)


def least_square(gram: Float[Array, "members members"]) -> Float[Array, " members"]:
    r"""The simplex weights that minimize :math:`w^\top G w / 2`."""
    members = gram.shape[0]
    scale = jnp.maximum(jnp.max(jnp.abs(gram)), jnp.finfo(gram.dtype).tiny)
    unit = gram / scale

    def model(weight: Array, mu: Array) -> Model:
        del mu
        gradient = unit @ weight
        flat = lambda step: jnp.zeros((), step.dtype)  # noqa: E731
        return Model(weight @ gradient / 2, gradient, unit, flat)

    start = jnp.full(members, 1 / members, gram.dtype)
    last = float(4 * jnp.finfo(gram.dtype).eps)
    return minimize(model, start, barrier=1.0, last_barrier=last).weight
