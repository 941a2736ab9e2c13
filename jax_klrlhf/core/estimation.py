r"""Maximum-likelihood estimation of a linear Bradley-Terry reward.

.. math:: \hat\theta = \arg\min_{\|\theta\| \le B} F(\theta), \qquad
          F(\theta) = \sum_i w_i\, \ell(\langle \theta, z_i \rangle, y_i)
                      + \tfrac{\lambda}{2} \|\theta\|^2

with z_i = phi(x_i, a_i^1) - phi(x_i, a_i^2), y_i the probability that the first was preferred and
l the Bradley-Terry negative log-likelihood in nats. The likelihood is a *sum* over comparisons, so
that `ridge` is the lambda of Sigma = lambda I + sum z z^T and the Hessian of F lies between
gamma Sigma and Sigma. Source: Xiong et al. (arXiv 2312.11456), the MLE of section 3; Zhu et al.
(arXiv 2301.11270), eq. 2.

The solver is Newton's method with the step length of a generalized self-concordant function (Sun &
Tran-Dinh, arXiv 1703.04599, nu = 2). Along a step p the logistic curvature changes by at most the
factor exp(t max_i |z_i^T p|), so t = log(1 + m) / m with m = max_i |z_i^T p| lowers F at every
iteration without a line search, and tends to 1 fast enough to keep the quadratic rate.

Axes: ``n`` (comparisons), ``dim`` (features).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from jax_klrlhf.core import bradley_terry, linalg, numerics
from jax_klrlhf.core.numerics import Scalar

_HIGHEST = lax.Precision.HIGHEST


class Fit(NamedTuple):
    """A fitted reward: `theta [dim]`, whether it is the optimum, and the Newton steps spent."""

    theta: Float[Array, " dim"]
    converged: Bool[Array, ""]
    iterations: Int[Array, ""]


class _Data(NamedTuple):
    """Comparisons with the deleted rows (weight 0) zeroed, so that nothing in them is read."""

    differences: Float[Array, "n dim"]
    labels: Float[Array, " n"]
    weights: Float[Array, " n"]


def nll(
    theta: Float[Array, " dim"],
    differences: Float[Array, "n dim"],
    labels: Shaped[Array, " n"],
    *,
    ridge: Scalar,
    weights: Shaped[Array, " n"] | None = None,
) -> Float[Array, ""]:
    r"""The objective F of this module: summed negative log-likelihood plus half the ridge, in nats.

    >>> z, y = jnp.ones((2, 1)), jnp.array([1.0, 0.0])
    >>> float(nll(jnp.zeros(1), z, y, ridge=0.0))  # 2 log 2
    1.386...
    """
    return _value(theta, _prepare(differences, labels, weights), ridge)


def hessian(
    theta: Float[Array, " dim"],
    differences: Float[Array, "n dim"],
    *,
    ridge: Scalar,
    weights: Shaped[Array, " n"] | None = None,
) -> Float[Array, "dim dim"]:
    r"""Hessian of F, :math:`\sum_i w_i \sigma'(z_i^\top \theta) z_i z_i^\top + \lambda I`.

    It does not depend on the labels: it is also the Fisher information, plus the ridge.

    >>> float(hessian(jnp.zeros(1), jnp.ones((4, 1)), ridge=1.0)[0, 0])  # 4 * 1/4 + 1
    2.0
    """
    labels = jnp.zeros(differences.shape[0], differences.dtype)
    data = _prepare(differences, labels, weights)
    margin = jnp.matmul(data.differences, theta, precision=_HIGHEST)
    return _gram(data, margin) + ridge * jnp.eye(theta.shape[0], dtype=theta.dtype)


def fit(
    differences: Float[Array, "n dim"],
    labels: Shaped[Array, " n"],
    *,
    ridge: Scalar,
    bound: Scalar | None = None,
    weights: Shaped[Array, " n"] | None = None,
    init: Float[Array, " dim"] | None = None,
    iterations: int = 30,
) -> Fit:
    r"""Bradley-Terry maximum likelihood, with a ridge and, if given, ||theta|| <= bound.

    Args:
      differences: z_i, features of the first response minus those of the second.
      labels: y_i in [0, 1], or booleans: the probability that the first was preferred.
      ridge: lambda >= 0 of F, which is a sum over rows (not a mean).
      bound: B > 0. Each step then minimizes the quadratic model *inside the ball*, by the Lagrange
        multiplier; the result satisfies grad F = -mu theta, mu >= 0, and is no rescaled ridge fit.
      weights: w_i >= 0, or booleans. A row of weight 0 is deleted: nothing in it is read, and the
        gradient with respect to it is 0. A mask of the rows seen so far gives a growing data set
        of fixed shape.
      init: where Newton starts (default 0); the fit of the round before saves iterations.
      iterations: the most Newton steps taken; it stops earlier once converged.

    Returns:
      `Fit`. `converged` is True once a step moved no margin by more than sqrt(eps) (relative to
      1 + the largest margin) with a Newton decrement below sqrt(eps (1 + sum w)), eps that of the
      dtype: the step after it would be of size eps. It is False when no finite optimum exists:
      data separated by theta with neither ridge nor bound. theta is finite then too.

    Gradients with respect to differences, labels, weights, ridge and bound are those of the
    optimum, by the implicit function theorem, in forward and reverse mode; they mean something
    where `converged` holds and the optimum is unique. `init` has none.

    Raises:
      ValueError: on a negative ridge, a bound or number of iterations that is not positive.
    """
    _check(ridge, bound, iterations)
    data = _prepare(differences, labels, weights)
    dim = differences.shape[1]
    ridge = jnp.asarray(ridge, differences.dtype)
    start = jnp.zeros(dim, differences.dtype) if init is None else init
    if bound is not None:
        bound = jnp.asarray(bound, differences.dtype)
        start = _project(start, bound)
    if init is not None:
        # A start worse than 0 may lie where every curvature has underflowed: begin at 0 instead.
        better = _value(start, data, ridge) <= _value(jnp.zeros_like(start), data, ridge)
        start = jnp.where(better, start, 0.0)
    # An upper bound of the Hessian's trace, whatever theta is.
    scale = 0.25 * jnp.sum(data.weights[:, None] * data.differences**2) + ridge * dim
    scale = lax.stop_gradient(scale + jnp.finfo(scale.dtype).tiny)

    def residual(theta: Float[Array, " dim"]) -> Float[Array, " dim"]:
        margin = jnp.matmul(data.differences, theta, precision=_HIGHEST)
        gradient = _gradient(data, margin) + ridge * theta
        if bound is None:
            return gradient
        # Zero exactly at the optimum on the ball, and differentiable in the bound too.
        return scale * (theta - _project(theta - gradient / scale, bound))

    def solve(_, theta):
        return _newton(theta, data, ridge, bound, scale, iterations)

    def tangent_solve(linear, tangent):
        return jnp.linalg.solve(jax.jacobian(linear)(tangent), tangent)

    # custom_root cannot differentiate beside an integer or boolean output, so both pass as floats.
    theta, (converged, steps) = lax.custom_root(
        residual, lax.stop_gradient(start), solve, tangent_solve, has_aux=True
    )
    return Fit(theta=theta, converged=converged > 0, iterations=steps.astype(jnp.int32))


def _check(ridge: Scalar, bound: Scalar | None, iterations: int) -> None:
    numerics.check_positive("ridge", ridge, or_zero=True)
    if bound is not None:
        numerics.check_between(
            "bound", bound, 0, jnp.inf, low_open=True, why="pass None for an unconstrained fit"
        )
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")


def _prepare(
    differences: Float[Array, "n dim"],
    labels: Shaped[Array, " n"],
    weights: Shaped[Array, " n"] | None,
) -> _Data:
    dtype = differences.dtype
    labels = labels.astype(dtype)
    if weights is None:
        return _Data(differences, labels, jnp.ones(labels.shape, dtype))
    keep = weights > 0 if weights.dtype != jnp.bool_ else weights
    return _Data(
        differences=jnp.where(keep[:, None], differences, 0.0),
        labels=jnp.where(keep, labels, 0.5),
        weights=jnp.where(keep, weights.astype(dtype), 0.0),
    )


def _value(theta: Float[Array, " dim"], data: _Data, ridge: Scalar) -> Float[Array, ""]:
    margin = jnp.matmul(data.differences, theta, precision=_HIGHEST)
    loss = bradley_terry.nll(margin, label=data.labels)
    return data.weights @ loss + 0.5 * ridge * (theta @ theta)


def _gradient(data: _Data, margin: Float[Array, " n"]) -> Float[Array, " dim"]:
    """Gradient of the summed likelihood."""
    error = data.weights * (jax.nn.sigmoid(margin) - data.labels)
    return jnp.matmul(error, data.differences, precision=_HIGHEST)


def _gram(data: _Data, margin: Float[Array, " n"]) -> Float[Array, "dim dim"]:
    """Hessian of the summed likelihood."""
    curvature = data.weights * bradley_terry.curvature(margin)
    weighted = data.differences * curvature[:, None]
    return jnp.matmul(weighted.T, data.differences, precision=_HIGHEST)


def _project(theta: Float[Array, " dim"], bound: Float[Array, ""]) -> Float[Array, " dim"]:
    """Nearest point of the ball; the double `where` keeps the gradient finite at 0."""
    square = jnp.sum(theta**2)
    outside = square > bound**2
    return jnp.where(outside, bound * lax.rsqrt(jnp.where(outside, square, 1.0)), 1.0) * theta


class _State(NamedTuple):
    theta: Float[Array, " dim"]
    multiplier: Float[Array, ""]
    converged: Bool[Array, ""]
    steps: Int[Array, ""]


def _newton(theta, data, ridge, bound, scale, iterations):
    """The Newton loop: returns theta and (converged, number of steps)."""
    dtype = theta.dtype
    eps = jnp.finfo(dtype).eps
    identity = jnp.eye(theta.shape[0], dtype=dtype)
    total = jnp.sum(data.weights)

    def body(state: _State) -> _State:
        margin = jnp.matmul(data.differences, state.theta, precision=_HIGHEST)
        gradient = _gradient(data, margin) + ridge * state.theta
        curvature = _gram(data, margin) + ridge * identity
        # Singular data: a jitter of the size of the round-off keeps Cholesky alive. It raises the
        # model, so the step stays a descent step of the same guarantee. The second term matters
        # where every curvature has underflowed, the last where every row is zero.
        jitter = eps * jnp.trace(curvature) + eps**2 * scale + jnp.finfo(dtype).tiny
        model = curvature + jitter * identity
        if bound is None:
            white = linalg.inverse_factor(model)
            step = -white.T @ (white @ gradient)
            multiplier = state.multiplier
            feasible = _has_optimum(margin, data, ridge, jnp.diagonal(white) ** -2, jitter)
        else:
            target = jnp.matmul(model, state.theta, precision=_HIGHEST) - gradient
            goal, multiplier = _ball_minimum(model, target, bound, state.multiplier)
            step, feasible = goal - state.theta, True
        move = jnp.matmul(data.differences, step, precision=_HIGHEST)
        largest = jnp.max(jnp.abs(move), initial=0.0)
        tiny = largest < eps
        damping = jnp.where(tiny, 1.0, jnp.log1p(largest) / jnp.where(tiny, 1.0, largest))
        decrement = step @ jnp.matmul(curvature, step, precision=_HIGHEST)
        still = largest <= jnp.sqrt(eps) * (1.0 + jnp.max(jnp.abs(margin), initial=0.0))
        converged = still & (decrement <= eps * (1.0 + total)) & feasible
        return _State(state.theta + damping * step, multiplier, converged, state.steps + 1)

    start = _State(theta, jnp.zeros((), dtype), jnp.array(False), jnp.array(0, jnp.int32))
    final = lax.while_loop(lambda s: (s.steps < iterations) & ~s.converged, body, start)
    return final.theta, (final.converged.astype(dtype), final.steps.astype(dtype))


def _has_optimum(margin, data, ridge, pivots, jitter):
    """False where the data are seen to be separated, so that theta can be scaled up for ever."""
    eps = jnp.finfo(margin.dtype).eps
    informative = jnp.any(data.differences != 0, axis=1)
    certain = jnp.where(data.labels >= 1, margin, jnp.where(data.labels <= 0, -margin, 0.0))
    # Every comparison ranked rightly is a proof. One that is right to the last bit, in a direction
    # where all curvature is gone, is how separation of some rows only looks in finite precision.
    proof = jnp.all((certain > 0) | ~informative) & jnp.any(informative)
    saturated = jnp.any(certain > -jnp.log(eps))
    flat = jnp.min(pivots) <= 4 * pivots.size * jitter
    return (ridge > 0) | ~(proof | (saturated & flat))


def _ball_minimum(model, target, bound, multiplier):
    r"""Minimize the quadratic :math:`\tfrac12 t^\top M t - b^\top t` over ||t|| <= bound.

    t(mu) = (M + mu I)^{-1} b. Newton on 1/||t(mu)|| = 1/bound, which is concave in mu: from either
    side one step lands at or below the root and the rest rise to it (Moré & Sorensen, 1983).
    """
    identity = jnp.eye(target.shape[0], dtype=target.dtype)
    tolerance = 4 * jnp.finfo(target.dtype).eps

    def at(mu):
        white = linalg.inverse_factor(model + mu * identity)
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

    point, change, done = at(multiplier)
    first = (multiplier, point, change, done, jnp.array(0, jnp.int32))
    mu, point, _, _, _ = lax.while_loop(lambda c: ~c[3] & (c[4] < 40), body, first)
    return _project(point, bound), mu
