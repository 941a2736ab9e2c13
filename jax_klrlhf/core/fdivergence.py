r"""f-divergences as values: what regularizes, from which loss, optimum and estimators follow.

.. math:: D_f(\pi \| \pi_0) = E_{\pi_0} f(z), \qquad z = \pi / \pi_0, \quad u = \log z, \quad
    f(1) = f'(1) = 0

================================= ============================== ============== ==========
member                            f'(z), the link                supremum       f(0)
================================= ============================== ============== ==========
:data:`reverse_kl` KL(pi || pi0)  log z                          inf            1
:data:`forward_kl` KL(pi0 || pi)  1 - 1/z                        1              inf
:data:`jensen_shannon`            log(2z / (1 + z))              log 2          log 2
:func:`alpha` of order a          (1 - z^-a) / a                 1/a            1/(1 - a)
:data:`chi_po`                    z - 1 + log z                  inf            3/2
================================= ============================== ============== ==========

Each is a :class:`FDivergence` of functions of the log-ratio u. On samples of pi two of them are
estimators, and these are the estimators in use:

* ``value`` is f(z)/z, whose mean is the divergence: never negative, of low variance (k3 is that of
  the reverse KL). Differentiated as a loss it is another one.
* ``surrogate`` is the integral of the link: *differentiated*, the sample held fixed, its mean is
  the gradient of the divergence, :math:`\nabla D_f = E_\pi[f'(z) \nabla \log \pi]`. k2 is that of
  the reverse KL, and k3 is that of the *forward* KL.

Sources: f-DPO (arXiv 2309.16240), f-DPG (2302.08215), chi-squared preference optimization
(2407.13399). Total variation and chi-squared have no member: f'(0) must be -inf, or the optimum
leaves the support, and the minimizer of f-DPO depends on who is compared.

Axes: ``batch`` (free leading axes), ``actions`` (what is chosen among, always last).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jax_klrlhf.core import bradley_terry, numerics
from jax_klrlhf.core.numerics import exp_remainder, linear_exp

Map = Callable[[Array], Array]


class FDivergence(NamedTuple):
    """One divergence: elementwise functions of a log-ratio u, with the link 0 at u = 0.

    >>> float(forward_kl.link(jnp.log(jnp.array(0.25))))  # 1 - 4
    -3.0
    """

    link: Map
    """f'(e^u): increasing, -inf at z = 0. Where 1/z would overflow, continued linearly in u."""
    inverse: Map
    """u of a value of the link below its supremum."""
    surrogate: Map
    """The integral of the link over u, from 0: convex and never negative."""
    value: Map
    """f(z) / z: never negative."""
    supremum: float
    """Of the link, at z = inf: what each unit of pi costs where pi0 is 0."""
    at_zero: float
    """f(0): what each unit of pi0 costs where pi is 0."""


def categorical(
    log_p: Float[Array, "*batch actions"],
    log_q: Float[Array, "*batch actions"],
    *,
    divergence: FDivergence,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Exact :math:`D_f(p \| q) = \sum_a q f(p/q)` of two normalized laws, in nats.

    Every term is non-negative and as accurate as its logarithms. Of the reverse KL it is
    :math:`\sum p \log\frac{p}{q} - p + q`, where :func:`.divergence.categorical` sums terms of both
    signs: near p = q, in float32, that leaves no digit and at times the wrong sign. +inf, with
    gradient 0, where p or q is 0 alone and that costs infinitely much. No action kept: 0.

    >>> p, q = jnp.log(jnp.array([0.2501, 0.7499])), jnp.log(jnp.array([0.25, 0.75]))
    >>> float(categorical(p, q, divergence=reverse_kl))  # (1e-4)^2 / (2 * 3/16)
    2.66...e-08
    """
    in_p, in_q = numerics.support(log_p, where), numerics.support(log_q, where)
    both = in_p & in_q
    log_p, log_q = jnp.where(in_p, log_p, 0), jnp.where(in_q, log_q, 0)
    ratio = jnp.where(both, log_p - log_q, 0)
    # Far below, p f(z)/z is q f(z) with z nearly 0, whose quotient would overflow.
    ends = math.isfinite(divergence.at_zero)
    end = -40.0 if ends else -25.0
    far = ratio < end
    term = jnp.exp(log_p) * divergence.value(jnp.where(far, 0, ratio))
    if ends:
        tail = jnp.full_like(ratio, divergence.at_zero)
    else:
        at = jnp.full_like(ratio, end)
        tail = jnp.exp(at) * (divergence.value(at) + divergence.link(at) * (ratio - end))
    term = jnp.where(both, jnp.where(far, jnp.exp(log_q) * tail, term), 0)
    infinite = jnp.zeros(term.shape[:-1], bool)
    for alone, log_mass, cost in (
        (in_p & ~in_q, log_p, divergence.supremum),
        (in_q & ~in_p, log_q, divergence.at_zero),
    ):
        if math.isfinite(cost):
            term = term + jnp.where(alone, cost * jnp.exp(log_mass), 0)
        else:
            infinite = infinite | jnp.any(alone, axis=-1)
    return jnp.where(infinite, jnp.inf, jnp.sum(term, axis=-1))


reverse_kl = FDivergence(
    link=lambda u: u,
    inverse=lambda v: v,
    surrogate=lambda u: u**2 / 2,
    value=lambda u: exp_remainder(-u),
    supremum=math.inf,
    at_zero=1.0,
)
r"""KL(pi || pi0), :math:`f = z \log z - z + 1`: the regularizer of arXiv 2312.11456 and of DPO."""


def _split(u: Array, at: float, below: Map, above: Map) -> Array:
    """``below(u)`` for u < at, else ``above(u)``; neither sees the other's arguments."""
    low = u < at
    return jnp.where(low, below(jnp.where(low, u, at)), above(jnp.where(low, at, u)))


def _near(u: Array, near: Map, far: Map) -> Array:
    """``near(u)`` for \\|u\\| < 1/2, else ``far(u)``."""
    small = jnp.abs(u) < 0.5
    return jnp.where(small, near(jnp.where(small, u, 0)), far(jnp.where(small, 1, u)))


forward_kl = FDivergence(
    link=lambda u: 1 - linear_exp(-u),
    inverse=lambda v: -jnp.log1p(-v),
    surrogate=lambda u: exp_remainder(-u),
    value=lambda u: _near(
        u, lambda x: jnp.exp(-x) * exp_remainder(x), lambda x: 1 - jnp.exp(-x) * (1 + x)
    ),
    supremum=1.0,
    at_zero=math.inf,
)
r"""KL(pi0 || pi), :math:`f = z - 1 - \log z`."""


def _log_mean(u: Array) -> Array:
    """log((1 + e^u)/2)."""
    return _near(u, lambda x: jnp.log1p(jnp.expm1(x) / 2), lambda x: jnp.logaddexp(x, 0.0) - _LOG2)


_LOG2 = math.log(2)


def _js_value(u: Array) -> Array:
    """Of KL to the mean of both laws, from each: 1/z of the second is what may overflow."""

    def above(x: Array) -> Array:
        return (1 + jnp.exp(-x)) / 2 - jnp.exp(-x) * (1 + _log_mean(x))

    second = _split(u, 0.5, lambda x: jnp.exp(-x) * exp_remainder(_log_mean(x)), above)
    return exp_remainder(_log_mean(-u)) + second


_NODES, _NODE_WEIGHTS = ((x / 2).tolist() for x in np.polynomial.legendre.leggauss(12))


@jax.custom_jvp
def _js_surrogate(u: Array) -> Array:
    r""":math:`u \log 2 + u^2/2 + Li_2(-e^u) - Li_2(-1)`, near 0 by quadrature: it cancels there."""

    def near(x: Array) -> Array:
        each = [w * -_log_mean(-x * (0.5 + n)) for n, w in zip(_NODES, _NODE_WEIGHTS, strict=True)]
        return x * sum(each)

    def far(x: Array) -> Array:
        # Li_2(-e^x) of a positive x by that of -x, or e^x would overflow.
        tail = jax.scipy.special.spence(1 + jnp.exp(-jnp.abs(x)))
        return x * _LOG2 + jnp.where(
            x > 0, -tail - math.pi**2 / 12, x**2 / 2 + tail + math.pi**2 / 12
        )

    return _near(u, near, far)


@_js_surrogate.defjvp
def _js_surrogate_jvp(primals, tangents):  # jax's spence has NaN for a gradient
    (u,), (tangent,) = primals, tangents
    return _js_surrogate(u), jensen_shannon.link(u) * tangent


jensen_shannon = FDivergence(
    link=lambda u: _LOG2 + bradley_terry.log_likelihood(u),
    inverse=lambda v: v - jnp.log(2 - jnp.exp(v)),
    surrogate=_js_surrogate,
    value=_js_value,
    supremum=_LOG2,
    at_zero=_LOG2,
)
r"""Jensen-Shannon, :math:`f = z \log z - (z + 1) \log \frac{z + 1}{2}`: twice the usual scale."""


def alpha(order: float | int) -> FDivergence:
    r"""alpha-divergence, from the reverse KL (``order`` 0) to the forward KL (``order`` 1).

    :math:`f = (z - 1)/a - (z^{1-a} - 1)/(a (1 - a))`, with a the order. Of f-TB the order runs the
    other way. ValueError outside of [0, 1].

    >>> float(alpha(0.5).link(jnp.log(jnp.array(0.25))))  # (1 - 2) / 0.5
    -2.0
    """
    numerics.check_between("alpha", order, 0, 1, why="0 is reverse KL, 1 is forward KL")
    if order in (0, 1):
        return forward_kl if order else reverse_kl
    rest = 1 - order

    def link(u: Array) -> Array:
        exponent = -order * u
        # expm1 where it matters, near 1, so that small orders do not cancel.
        small = jnp.expm1(jnp.minimum(exponent, 1.0))
        return -jnp.where(exponent < 1.0, small, linear_exp(exponent) - 1) / order

    def near(u: Array) -> Array:
        return jnp.exp(-u) * (exp_remainder(u) - exp_remainder(rest * u) / rest) / order

    def below(u: Array) -> Array:
        return 1 / order + jnp.exp(-u) / rest * (1 - jnp.exp(rest * u) / order)

    def above(u: Array) -> Array:
        return 1 / order + (jnp.exp(-u) - jnp.exp(-order * u) / order) / rest

    return FDivergence(
        link=link,
        inverse=lambda v: -jnp.log1p(-order * v) / order,
        surrogate=lambda u: exp_remainder(-order * u) / order**2,
        value=lambda u: _near(u, near, lambda x: _split(x, 0.0, below, above)),
        supremum=1 / order,
        at_zero=1 / rest,
    )


@jax.custom_jvp
def _chi_inverse(v: Array) -> Array:
    """The root of e^u + u = v + 1, by Newton from the right: the sum is convex."""
    total = v + 1
    u = jnp.where(total > 1, jnp.log(jnp.maximum(total, 1)), total)
    for _ in range(8):
        z = jnp.exp(u)
        u = u - (z + u - total) / (1 + z)
    return u


@_chi_inverse.defjvp
def _chi_inverse_jvp(primals, tangents):
    u = _chi_inverse(*primals)
    return u, tangents[0] / (1 + jnp.exp(u))


chi_po = FDivergence(
    link=lambda u: linear_exp(u) + u - 1,
    inverse=_chi_inverse,
    surrogate=lambda u: exp_remainder(u) + u**2 / 2,
    value=lambda u: 2 * jnp.sinh(u / 2) ** 2 + exp_remainder(-u),
    supremum=math.inf,
    at_zero=1.5,
)
r"""Half chi-squared plus KL, :math:`f = (z - 1)^2/2 + z \log z - z + 1` (arXiv 2407.13399)."""
