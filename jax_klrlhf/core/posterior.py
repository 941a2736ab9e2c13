r"""From comparisons to what is not known: the Laplace posterior of a linear reward.

.. math:: \theta \mid D \approx N(\hat\theta, H^{-1}), \qquad H = \nabla^2 F(\hat\theta)

with F of :mod:`core.estimation`: on a network's last layer this is last-layer Laplace, on an
adapter's per-example gradients Laplace-LoRA (arXiv 2308.13111). Draws are ensemble members.

**Measure uncertainty from an origin.** The variance of a single reward is not identified (a
constant feature adds any amount); that of a margin, or of a reward less its mean under pi0, is:
hand in ``phi - phi_bar``.

Axes: ``dim`` (features), ``n`` or ``batch`` (free: margins), ``members``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jaxtyping import Array, Float, Key

from jax_klrlhf.core import ellipsoid, linalg, numerics
from jax_klrlhf.core.numerics import Scalar


class Gaussian(NamedTuple):
    """N(mean, precision^-1)."""

    mean: Float[Array, " dim"]
    precision: Float[Array, "dim dim"]


def laplace(theta: Float[Array, " dim"], hessian: Float[Array, "dim dim"]) -> Gaussian:
    """The posterior at a fit: ``estimation.fit(...).theta`` and ``estimation.hessian`` there.

    The Hessian holds the ridge, which is the prior N(0, I / ridge). It is not the ellipsoid Sigma,
    which counts every comparison fully: at large margins a label says little.
    """
    return Gaussian(theta, hessian)


class Moments(NamedTuple):
    """Of a margin: mean and variance."""

    mean: Float[Array, "*batch"]
    variance: Float[Array, "*batch"]


def margin(state: Gaussian, directions: Float[Array, "*batch dim"]) -> Moments:
    """Mean and variance of ``<theta, z>``.

    >>> state = Gaussian(jnp.array([2.0, 0.0]), jnp.diag(jnp.array([4.0, 1.0])))
    >>> [float(x) for x in margin(state, jnp.array([1.0, 0.0]))]
    [2.0, 0.25]
    """
    as_ellipsoid = ellipsoid.Ellipsoid(state.precision, jnp.zeros((), state.precision.dtype))
    white = ellipsoid.whiten(as_ellipsoid, directions)
    return Moments(directions @ state.mean, jnp.sum(white**2, -1))


def probability(
    mean: Float[Array, "*batch"], variance: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    r"""Predictive preference :math:`\sigma(m / \sqrt{1 + \pi s^2 / 8})` (MacKay, 1992).

    Within 0.02 of the integral. It never changes who is preferred, only how surely.
    """
    return jax.nn.sigmoid(mean / jnp.sqrt(1 + jnp.pi / 8 * variance))


def draw(key: Key[Array, ""], state: Gaussian, members: int) -> Float[Array, "members dim"]:
    """Draws of theta: Thompson samples, ensemble members."""
    noise = jax.random.normal(key, (members, state.mean.shape[0]), state.mean.dtype)
    return state.mean[None] + noise @ linalg.inverse_factor(state.precision)


_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(24)


def _expect(function, mean: Array, variance: Array) -> Array:
    """E function(N(mean, variance)), by Gauss-Hermite quadrature."""
    last = (1,) * mean.ndim + (-1,)
    nodes = jnp.asarray(_NODES, mean.dtype).reshape(last)
    weights = jnp.asarray(_WEIGHTS / _WEIGHTS.sum(), mean.dtype).reshape(last)
    at = mean[..., None] + numerics.safe_sqrt(variance)[..., None] * nodes
    return jnp.sum(weights * function(at), -1)


def information(
    mean: Float[Array, "*batch"],
    variance: Float[Array, "*batch"],
    *,
    flip_rate: Scalar = 0.0,
) -> Float[Array, "*batch"]:
    r"""What a label would tell of theta, in nats: I(label; theta) = H(E p) - E H(p).

    ``flip_rate`` is the annotator's: at 1/2 a label tells nothing. Source: BALD, arXiv 1112.5745.
    """

    def noisy(m: Array) -> Array:
        return flip_rate + (1 - 2 * flip_rate) * jax.nn.sigmoid(m)

    def entropy(p: Array) -> Array:
        return entr(p) + entr(1 - p)

    inside = _expect(lambda m: entropy(noisy(m)), mean, variance)
    return jnp.maximum(entropy(_expect(noisy, mean, variance)) - inside, 0)


def deferral(
    mean: Float[Array, "*batch"], variance: Float[Array, "*batch"], *, cost: Scalar = 0.0
) -> Float[Array, "*batch"]:
    r"""Gain of asking one who knows the utility U of acting: E max(U, 0) - max(E U, 0) - cost.

    Never negative without a cost, 0 without uncertainty: why a machine that is unsure of its
    purpose leaves its off-switch alone (arXiv 1611.08219, with U Gaussian).

    >>> float(deferral(jnp.array(-3.0), jnp.array(0.0)))
    0.0
    """
    deviation = numerics.safe_sqrt(variance)
    known = deviation > 0
    z = mean / jnp.where(known, deviation, 1)
    density = jnp.exp(-(z**2) / 2) / jnp.sqrt(2 * jnp.pi)
    # E max(U, 0) - max(E U, 0), each side of 0 by itself: no cancellation of large means.
    tail = deviation * density - jnp.abs(mean) * jax.scipy.special.ndtr(-jnp.abs(z))
    return jnp.where(known, jnp.maximum(tail, 0), 0) - cost


def overseen(
    mean: Float[Array, "*batch"], variance: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    r"""Value of deferring to one who errs: E[U sigma(U)], for one who lets U pass at rate sigma(U).

    Against max(E U, 0): worse at a large ``|E U|``, however large the variance was worth to an
    overseer without error.
    """
    return _expect(lambda u: u * jax.nn.sigmoid(u), mean, variance)
