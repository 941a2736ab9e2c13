r"""Small numerical tools, each there for one trap.

Axes: ``batch`` (free leading axes), ``actions`` (what is chosen among, always last).
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

Scalar = Array | float | int
"""A hyper-parameter: a number, or a scalar array (traced, swept by ``vmap``)."""

EXP_LIMIT = 30.0
"""Where :func:`linear_exp` leaves the exponential: e^30 = 1e13, whose square is a float32."""


def check_positive(name: str, value: Scalar, *, or_zero: bool = False) -> None:
    """Refuse a hyper-parameter that is not positive (not negative, with ``or_zero``), or is NaN.

    Looks at what is concrete: numbers, and arrays outside of a transformation, all entries.

    >>> check_positive("kl_coef", 0.1)
    >>> check_positive("kl_coef", -0.1)
    Traceback (most recent call last):
    ValueError: kl_coef must be > 0, got -0.1
    """
    check_between(name, value, 0, math.inf, low_open=not or_zero)


def check_between(
    name: str,
    value: Scalar,
    low: float | int,
    high: float | int,
    *,
    low_open: bool = False,
    high_open: bool = False,
    why: str = "",
) -> None:
    """Refuse a hyper-parameter outside of an interval, as :func:`check_positive` does.

    ``why`` is added to the message of the ValueError.

    >>> check_between("flip_rate", 0.5, 0, 0.5, high_open=True)
    Traceback (most recent call last):
    ValueError: flip_rate must lie in [0, 0.5), got 0.5
    """
    if isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True):
        return
    found = np.asarray(value)
    # Written so that NaN fails.
    sound = (found > low if low_open else found >= low) & (
        found < high if high_open else found <= high
    )
    if sound.all():
        return
    bad = found if found.ndim == 0 else found[~sound][0]
    if high == math.inf:
        wanted = f"be {'>' if low_open else '>='} {low}"
    else:
        ends = "(" if low_open else "[", ")" if high_open else "]"
        wanted = f"lie in {ends[0]}{low}, {high}{ends[1]}"
    raise ValueError(f"{name} must {wanted}, got {bad}{why and ': ' + why}")


def at_least_float32(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Widen bfloat16 and float16 to float32; leave float32 and float64 as they are.

    >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def safe_sqrt(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""Square root with gradient 0 where ``x <= 0``.

    The norm of the difference of two identical responses is 0, and the gradient of ``sqrt`` there
    is infinite: times the 0 of the chain rule, NaN. A quadratic form that rounding made slightly
    negative counts as 0.

    >>> safe_sqrt(jnp.array([4.0, 0.0, -1e-9])).tolist()
    [2.0, 0.0, 0.0]
    """
    positive = x > 0
    # Two `where`: the first keeps the infinite slope out of the chain rule, the second the value.
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def linear_exp(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""``exp`` up to :data:`EXP_LIMIT`, its tangent line beyond: never infinite, still increasing.

    A probability ratio between two policies overflows float32 from 89 nats on. Clipping it would
    give the worst examples no gradient at all; the tangent keeps value and slope finite.

    >>> linear_exp(jnp.array([0.0, 1e4])).tolist()  # e^30 (1 + 1e4 - 30)
    [1.0, 1.06...e+17]
    """
    return jnp.exp(jnp.minimum(x, EXP_LIMIT)) * (1 + jnp.maximum(x - EXP_LIMIT, 0))


def exp_remainder(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""``e^x - 1 - x``, to the last digits at every x, and so never negative.

    ``expm1(x) - x`` has an absolute error of the rounding of x, which is more than its value,
    x^2/2, where x is small. Below 1/2 the series is summed instead. +inf where e^x overflows.

    >>> float(exp_remainder(jnp.array(-1e-4)))  # expm1 leaves one or two digits in float32
    4.9998...e-09
    """
    small = jnp.abs(x) < 0.5
    inner = jnp.where(small, x, 0)
    series = jnp.ones_like(inner)
    for order in range(16, 2, -1):
        series = 1 + series * inner / order
    return jnp.where(small, inner**2 / 2 * series, jnp.expm1(jnp.where(small, 1, x)) - x)


def support(
    log_prob: Float[Array, "*batch actions"], where: Bool[Array, "*batch actions"] | None
) -> Bool[Array, "*batch actions"]:
    """True at the actions that are kept by ``where`` and have positive probability.

    >>> support(jnp.log(jnp.array([0.5, 0.5, 0.0])), jnp.array([True, False, True])).tolist()
    [True, False, False]
    """
    positive = log_prob > -jnp.inf
    return positive if where is None else positive & where


def masked_logsumexp(
    x: Float[Array, "*batch actions"], where: Bool[Array, "*batch actions"]
) -> Float[Array, "*batch"]:
    """``log sum exp`` over the kept entries of the last axis; -inf, with gradient 0, if none is.

    What stands at a masked entry (NaN and infinities included) has no effect on value or gradient.

    >>> float(masked_logsumexp(jnp.log(jnp.array([3.0, 5.0, 7.0])), jnp.array([True, True, False])))
    2.079...
    """
    # Masked once: in a simulation the mask is as large as the rewards of all seeds.
    kept = jnp.where(where, x, -jnp.inf)
    largest = lax.stop_gradient(jnp.max(kept, axis=-1))
    none = largest == -jnp.inf
    shift = jnp.where(none, 0, largest)
    total = jnp.sum(jnp.exp(kept - shift[..., None]), axis=-1)
    return jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1, total)) + shift)


def masked_max(
    x: Float[Array, "*batch actions"], where: Bool[Array, "*batch actions"]
) -> Float[Array, "*batch"]:
    """Largest kept entry of the last axis, 0 if none is kept; a constant to the gradient.

    The shift that keeps an exponential in range. It cancels in exact arithmetic, so its gradient
    is not wanted.

    >>> float(masked_max(jnp.array([1.0, 9.0]), jnp.array([True, False])))
    1.0
    """
    largest = jnp.max(jnp.where(where, x, -jnp.inf), axis=-1)
    return lax.stop_gradient(jnp.where(jnp.any(where, axis=-1), largest, 0))


def expectation(
    log_prob: Float[Array, "*batch actions"],
    value: Float[Array, "*batch actions"],
    *,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch"]:
    r"""``sum_a p(a) value(a)`` over the kept actions of positive probability.

    0 times infinity counts as 0: a value that is infinite or NaN where ``p = 0`` (or at a masked
    entry) has no effect on value or gradient. No kept action gives 0.

    >>> float(expectation(jnp.log(jnp.array([0.25, 0.75, 0.0])), jnp.array([4.0, 8.0, jnp.nan])))
    7.0
    """
    keep = support(log_prob, where)
    prob = jnp.exp(jnp.where(keep, log_prob, 0))
    return jnp.sum(jnp.where(keep, prob * value, 0), axis=-1)
