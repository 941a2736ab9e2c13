r"""Maximum-likelihood estimation of a linear reward, from labels of any preference model.

.. math:: \hat\theta = \arg\min_{\|\theta\| \le B} F(\theta), \qquad
          F(\theta) = \sum_i w_i\, \ell(\langle \theta, z_i \rangle, y_i)
                      + \tfrac{\lambda}{2} \|\theta - \theta_0\|^2

with z_i = phi(x_i, a_i^1) - phi(x_i, a_i^2), y_i the label (of Bradley-Terry: the probability that
the first was preferred), l the model's negative log-likelihood in nats (:mod:`.preferences`) and
theta_0 a prior, 0 by default. The likelihood is a *sum* over comparisons, so
that `ridge` is the lambda of Sigma = lambda I + sum z z^T and the Hessian of F lies between
gamma Sigma and Sigma. Source: Xiong et al. (arXiv 2312.11456), the MLE of section 3; Zhu et al.
(arXiv 2301.11270), eq. 2.

The solver is Newton's method with the step length of a generalized self-concordant function (Sun &
Tran-Dinh, arXiv 1703.04599, nu = 2). Along a step p the logistic curvature changes by at most the
factor exp(t m), m = ``max_i |z_i^T p|``, so t = log(1 + m) / m lowers F at every iteration without
a line search, and tends to 1 fast enough to keep the quadratic rate. So it is
for every model that is ``concave``; for others the Hessian is replaced by the Fisher information
where it is not positive definite, and the step is halved until F falls.

Axes: ``n`` (comparisons), ``dim`` (features), ``responses`` (of a ranking).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from jax_klrlhf.core import bradley_terry, linalg, numerics, preferences
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.core.preferences import Link

_HIGHEST = lax.Precision.HIGHEST


class Fit(NamedTuple):
    """A fitted reward: `theta [dim]`, whether it is the optimum, and the Newton steps spent."""

    theta: Float[Array, " dim"]
    converged: Bool[Array, ""]
    iterations: Int[Array, ""]


class _Data(NamedTuple):
    """What F is made of; deleted rows (weight 0) zeroed, so that nothing in them is read."""

    differences: Float[Array, "n *responses dim"]
    labels: Float[Array, "n *responses"]
    weights: Float[Array, " n"]
    ridge: Scalar
    prior: Float[Array, " dim"] | None


def nll(
    theta: Float[Array, " dim"],
    differences: Float[Array, "n *responses dim"],
    labels: Shaped[Array, "n *responses"],
    *,
    ridge: Scalar,
    weights: Shaped[Array, " n"] | None = None,
    prior: Float[Array, " dim"] | None = None,
    link: Link = preferences.bradley_terry,
) -> Float[Array, ""]:
    r"""The objective F of this module: summed negative log-likelihood plus half the ridge, in nats.

    >>> z, y = jnp.ones((2, 1)), jnp.array([1.0, 0.0])
    >>> float(nll(jnp.zeros(1), z, y, ridge=0.0))  # 2 log 2
    1.386...
    """
    return _value(theta, _prepare(differences, labels, weights, ridge, prior), link)


def hessian(
    theta: Float[Array, " dim"],
    differences: Float[Array, "n *responses dim"],
    *,
    ridge: Scalar,
    weights: Shaped[Array, " n"] | None = None,
    labels: Shaped[Array, "n *responses"] | None = None,
    link: Link = preferences.bradley_terry,
) -> Float[Array, "dim dim"]:
    r"""Hessian of F, :math:`\sum_i w_i \ell''(z_i^\top \theta, y_i) z_i z_i^\top + \lambda I`.

    Of Bradley-Terry it does not depend on the labels: it is also the Fisher information, plus the
    ridge. Other models need them; ValueError without.

    >>> float(hessian(jnp.zeros(1), jnp.ones((4, 1)), ridge=1.0)[0, 0])  # 4 * 1/4 + 1
    2.0
    """
    if labels is None:
        if not link.logistic:
            raise ValueError("the Hessian of this model depends on the labels: give labels=")
        labels = jnp.zeros(differences.shape[0], differences.dtype)
    data = _prepare(differences, labels, weights, ridge, None)
    return _gram(data, _margin(data, theta), link) + ridge * jnp.eye(
        theta.shape[0], dtype=theta.dtype
    )


def fit(
    differences: Float[Array, "n *responses dim"],
    labels: Shaped[Array, "n *responses"],
    *,
    ridge: Scalar,
    bound: Scalar | None = None,
    weights: Shaped[Array, " n"] | None = None,
    init: Float[Array, " dim"] | None = None,
    prior: Float[Array, " dim"] | None = None,
    link: Link = preferences.bradley_terry,
    iterations: int = 30,
) -> Fit:
    r"""Maximum likelihood, with a ridge and, if given, ||theta|| <= bound.

    Args:
      differences: z_i, features of the first response minus those of the second; of a ranking
        ``[n, responses, dim]``, features of each (from any origin: only differences count).
      labels: y_i in [0, 1], or booleans: the probability that the first was preferred. A half for
        a tie is a tie to a model with ties (:func:`.preferences.davidson`); to Bradley-Terry it is
        a win and a loss, which shrinks theta. Of a ranking: the rank of each response.
      ridge: lambda >= 0 of F, which is a sum over rows (not a mean).
      bound: B > 0. Each step then minimizes the quadratic model *inside the ball*, by the Lagrange
        multiplier; the result satisfies grad F = -mu theta, mu >= 0, and is no rescaled ridge fit.
      weights: w_i >= 0, or booleans. A row of weight 0 is deleted: nothing in it is read, and the
        gradient with respect to it is 0. A mask of the rows seen so far gives a growing data set
        of fixed shape.
      init: where Newton starts (default the prior); the fit of the round before saves iterations.
      prior: theta_0, what the ridge pulls to (default 0): a fit of other data is transfer.
      link: the preference model. Its parameters may be arrays, one entry per row.
      iterations: the most Newton steps taken; it stops earlier once converged.

    Returns:
      `Fit`. `converged` is True once a step moved no margin by more than sqrt(eps) (relative to
      1 + the largest margin) with a Newton decrement below sqrt(eps (1 + sum w)), eps that of the
      dtype: the step after it would be of size eps. It is False when no finite optimum exists:
      data separated by theta with neither ridge nor bound. theta is finite then too.

    Gradients with respect to differences, labels, weights, ridge, bound, prior and the model's
    parameters are those of the
    optimum, by the implicit function theorem, in forward and reverse mode; they mean something
    where `converged` holds and the optimum is unique. `init` has none.

    Raises:
      ValueError: on a negative ridge, a bound or number of iterations that is not positive.
    """
    _check(ridge, bound, iterations)
    dtype = differences.dtype
    dim = differences.shape[-1]
    data = _prepare(differences, labels, weights, jnp.asarray(ridge, dtype), prior)
    start = jnp.zeros(dim, dtype) if prior is None else prior
    origin = start
    if init is not None:
        start = init
    if bound is not None:
        bound = jnp.asarray(bound, dtype)
        start, origin = linalg.project(start, bound), linalg.project(origin, bound)
    if init is not None:
        # A start worse than 0 may lie where every curvature has underflowed: begin at 0 instead.
        better = _value(start, data, link) <= _value(origin, data, link)
        start = jnp.where(better, start, origin)
    # An upper bound of the Hessian's trace, whatever theta is.
    square = jnp.sum(data.differences**2, axis=tuple(range(1, data.differences.ndim)))
    scale = _STEEPEST * (data.weights @ square) + data.ridge * dim
    scale = lax.stop_gradient(scale + jnp.finfo(scale.dtype).tiny)

    def residual(theta: Float[Array, " dim"]) -> Float[Array, " dim"]:
        gradient = _gradient(data, theta, _margin(data, theta), link)
        if bound is None:
            return gradient
        # Zero exactly at the optimum on the ball, and differentiable in the bound too.
        return scale * (theta - linalg.project(theta - gradient / scale, bound))

    def solve(_, theta):
        return _newton(theta, data, link, bound, scale, iterations)

    def tangent_solve(linear, tangent):
        return jnp.linalg.solve(jax.jacobian(linear)(tangent), tangent)

    # custom_root cannot differentiate beside an integer or boolean output, so both pass as floats.
    theta, (converged, steps) = lax.custom_root(
        residual, lax.stop_gradient(start), solve, tangent_solve, has_aux=True
    )
    return Fit(theta=theta, converged=converged > 0, iterations=steps.astype(jnp.int32))


_COLUMNS, _LARGE = 256, 2**21
"""Columns of a Gram matrix at a time, where the data have so many entries."""
_STEEPEST = 0.25
"""The largest curvature of Bradley-Terry; the scale it sets is free, so it serves all models."""


def _check(ridge: Scalar, bound: Scalar | None, iterations: int) -> None:
    numerics.check_positive("ridge", ridge, or_zero=True)
    if bound is not None:
        numerics.check_between(
            "bound", bound, 0, jnp.inf, low_open=True, why="pass None for an unconstrained fit"
        )
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")


def _prepare(
    differences: Float[Array, "n *responses dim"],
    labels: Shaped[Array, "n *responses"],
    weights: Shaped[Array, " n"] | None,
    ridge: Scalar,
    prior: Float[Array, " dim"] | None,
) -> _Data:
    dtype = differences.dtype
    labels = labels.astype(dtype)
    if weights is None:
        weights = jnp.ones(labels.shape[0], dtype)
        return _Data(differences, labels, weights, ridge, prior)
    keep = weights > 0 if weights.dtype != jnp.bool_ else weights
    rows = keep.reshape(-1, *(1,) * (labels.ndim - 1))
    return _Data(
        differences=jnp.where(rows[..., None], differences, 0.0),
        labels=jnp.where(rows, labels, 0.5),
        weights=jnp.where(keep, weights.astype(dtype), 0.0),
        ridge=ridge,
        prior=prior,
    )


def _margin(data: _Data, theta: Float[Array, " dim"]) -> Float[Array, "n *responses"]:
    return jnp.matmul(data.differences, theta, precision=_HIGHEST)


def _value(theta: Float[Array, " dim"], data: _Data, link: Link) -> Float[Array, ""]:
    loss = link.nll(_margin(data, theta), label=data.labels)
    away = theta if data.prior is None else theta - data.prior
    return data.weights @ loss + 0.5 * data.ridge * (away @ away)


def _gradient(
    data: _Data, theta: Float[Array, " dim"], margin: Float[Array, "n *responses"], link: Link
) -> Float[Array, " dim"]:
    if link.logistic:
        slope = jax.nn.sigmoid(margin) - data.labels
    else:
        slope = _slope(link, margin, data.labels)
    rows = data.weights.reshape(-1, *(1,) * (margin.ndim - 1))
    flat = data.differences.reshape(-1, theta.shape[0])
    away = theta if data.prior is None else theta - data.prior
    return jnp.matmul((rows * slope).ravel(), flat, precision=_HIGHEST) + data.ridge * away


def _slope(link: Link, margin: Array, labels: Array) -> Array:
    """First derivative of every row's loss in its scores."""
    return jax.grad(lambda m: jnp.sum(link.nll(m, label=labels)))(margin)


def _gram(data: _Data, margin: Float[Array, "n *responses"], link: Link) -> Float[Array, "dim dim"]:
    """Hessian of the summed likelihood."""
    if margin.ndim == 1:
        if link.logistic:
            return _weighted_gram(data, bradley_terry.curvature(margin))
        return _weighted_gram(data, _derivative(lambda m: _slope(link, m, data.labels), margin))

    def of_row(z: Array, row: Array, label: Array) -> Array:
        second = jax.hessian(lambda r: link.nll(r, label=label))(row)
        return jnp.matmul(z.T, jnp.matmul(second, z, precision=_HIGHEST), precision=_HIGHEST)

    rows = jax.vmap(of_row)(data.differences, margin, data.labels)
    return jnp.einsum("n,nij->ij", data.weights, rows, precision=_HIGHEST)


def _weighted_gram(data: _Data, curvature: Float[Array, " n"]) -> Float[Array, "dim dim"]:
    r""":math:`\sum_i w_i c_i z_i z_i^\top`, a few of its columns at a time.

    Whole, the weighted rows would be a second copy of the data. Columns are cut, not rows, which
    may lie over several devices.
    """
    rows, dim = data.differences.shape
    weights = (data.weights * curvature)[:, None]

    def columns(of: Float[Array, "n _"]) -> Float[Array, "dim _"]:
        return jnp.matmul(data.differences.T, of * weights, precision=_HIGHEST)

    if dim <= _COLUMNS or rows * dim < _LARGE:
        return columns(data.differences)

    def block(_: None, begin: Int[Array, ""]) -> tuple[None, Float[Array, "dim _"]]:
        return None, columns(lax.dynamic_slice_in_dim(data.differences, begin, _COLUMNS, axis=1))

    # The last block begins earlier where the columns do not divide: some are then counted twice,
    # and the first count is the one that is kept.
    begins = jnp.minimum(jnp.arange(0, dim, _COLUMNS), dim - _COLUMNS)
    _, blocks = lax.scan(block, None, begins)
    found = jnp.moveaxis(blocks, 0, 1).reshape(dim, -1)
    kept = dim - dim % _COLUMNS
    return jnp.concatenate([found[:, :kept], found[:, found.shape[1] - (dim - kept) :]], axis=1)


def _derivative(function: Callable[[Array], Array], at: Array) -> Array:
    """Of a function that acts on each entry alone."""
    return jax.jvp(function, (at,), (jnp.ones_like(at),))[1]


class _State(NamedTuple):
    theta: Float[Array, " dim"]
    multiplier: Float[Array, ""]
    converged: Bool[Array, ""]
    steps: Int[Array, ""]


def _newton(theta, data, link, bound, scale, iterations):
    """The Newton loop: returns theta and (converged, number of steps)."""
    dtype = theta.dtype
    eps = jnp.finfo(dtype).eps
    identity = jnp.eye(theta.shape[0], dtype=dtype)
    total = jnp.sum(data.weights)

    def regular(curvature):
        # Singular data: a jitter of the size of the round-off keeps Cholesky alive. It raises the
        # model, so the step stays a descent step of the same guarantee. The second term matters
        # where every curvature has underflowed, the last where every row is zero.
        jitter = eps * jnp.trace(curvature) + eps**2 * scale + jnp.finfo(dtype).tiny
        return curvature + jitter * identity, jitter

    def body(state: _State) -> _State:
        margin = _margin(data, state.theta)
        gradient = _gradient(data, state.theta, margin, link)
        curvature = _gram(data, margin, link) + data.ridge * identity
        model, jitter = regular(curvature)
        if not link.concave:
            information = _weighted_gram(data, link.information(margin)) + data.ridge * identity
            safe, _ = regular(information)
            convex = jnp.all(jnp.isfinite(linalg.inverse_factor(model)))
            model = jnp.where(convex, model, safe)
            curvature = jnp.where(convex, curvature, information)
        if bound is None:
            white = linalg.inverse_factor(model)
            step = -white.T @ (white @ gradient)
            multiplier = state.multiplier
            feasible = _has_optimum(margin, data, jnp.diagonal(white) ** -2, jitter)
        else:
            target = jnp.matmul(model, state.theta, precision=_HIGHEST) - gradient
            goal, multiplier = linalg.ball_minimum(model, target, bound, state.multiplier)
            step, feasible = goal - state.theta, True
        move = _margin(data, step)
        largest = jnp.max(jnp.abs(move), initial=0.0)
        if margin.ndim > 1:  # scores of one ranking count by their differences
            largest = jnp.max(jnp.max(move, -1) - jnp.min(move, -1), initial=0.0)
        tiny = largest < eps
        damping = jnp.where(tiny, 1.0, jnp.log1p(largest) / jnp.where(tiny, 1.0, largest))
        decrement = step @ jnp.matmul(curvature, step, precision=_HIGHEST)
        still = largest <= jnp.sqrt(eps) * (1.0 + jnp.max(jnp.abs(margin), initial=0.0))
        converged = still & (decrement <= eps * (1.0 + total)) & feasible
        if not link.concave:
            lengths = 2.0 ** -jnp.arange(12, dtype=dtype)
            values = jax.vmap(lambda t: _value(state.theta + t * step, data, link))(lengths)
            damping = jnp.where(converged, 1.0, lengths[jnp.argmin(values)])
        return _State(state.theta + damping * step, multiplier, converged, state.steps + 1)

    start = _State(theta, jnp.zeros((), dtype), jnp.array(False), jnp.array(0, jnp.int32))
    final = lax.while_loop(lambda s: (s.steps < iterations) & ~s.converged, body, start)
    return final.theta, (final.converged.astype(dtype), final.steps.astype(dtype))


def _has_optimum(margin, data, pivots, jitter):
    """False where the data are seen to be separated, so that theta can be scaled up for ever."""
    flat = jnp.min(pivots) <= 4 * pivots.size * jitter
    if margin.ndim > 1:
        return (data.ridge > 0) | ~flat
    eps = jnp.finfo(margin.dtype).eps
    informative = jnp.any(data.differences != 0, axis=1)
    certain = jnp.where(data.labels >= 1, margin, jnp.where(data.labels <= 0, -margin, 0.0))
    # Every comparison ranked rightly is a proof. One that is right to the last bit, in a direction
    # where all curvature is gone, is how separation of some rows only looks in finite precision.
    proof = jnp.all((certain > 0) | ~informative) & jnp.any(informative)
    saturated = jnp.any(certain > -jnp.log(eps))
    return (data.ridge > 0) | ~(proof | (saturated & flat))
