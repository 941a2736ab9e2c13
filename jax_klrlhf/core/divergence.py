r"""Kullback-Leibler divergence: exact over enumerated actions, estimated from samples.

From samples of pi, with ``log_ratio = log pi(a|x) - log pi_ref(a|x)``, three estimators are in use
(Schulman, "Approximating KL divergence", 2020). Their *values* and their *gradients as a sample
loss* (differentiated through ``log_ratio`` with the sample held fixed, and averaged over a ~ pi)
are two questions:

========= ============================ ========================= ===============================
estimator formula                      expectation under pi      expected gradient as a loss
========= ============================ ========================= ===============================
k1        log_ratio                    KL(pi || ref)             0
k2        log_ratio^2 / 2              KL up to third order      gradient of KL(pi || ref)
k3        exp(-log_ratio)-1+log_ratio  KL(pi || ref)             gradient of KL(ref || pi)
========= ============================ ========================= ===============================

So report k1 or k3, and differentiate k2. (In a score-function estimator the divergence stands as a
constant times the score, and there the value is what counts: k1 or k3.)

Axes: ``batch`` (free leading axes), ``actions`` (what is chosen among, always last).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jax_klrlhf.core.numerics import exp_remainder, expectation, support


def categorical(
    log_p: Float[Array, "*batch actions"],
    log_q: Float[Array, "*batch actions"],
    *,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Exact :math:`\mathrm{KL}(p \| q) = \sum_a p(a) \log \frac{p(a)}{q(a)}`, in nats.

    ``categorical(log_prob, ref_log_prob)`` is the regularizer of arXiv 2312.11456, ("reverse KL").
    An action with p = 0 (or masked) contributes nothing, to value or gradient. Where p > 0 = q the
    result is +inf, with gradient 0. A row with no kept action gives 0.

    >>> p, q = jnp.array([1.0, 0.0]), jnp.array([0.25, 0.75])
    >>> float(categorical(jnp.log(p), jnp.log(q)))  # log 4
    1.386...
    >>> float(categorical(jnp.log(q), jnp.log(p)))
    inf
    """
    in_p, in_q = support(log_p, where), support(log_q, where)
    both = in_p & in_q
    finite = expectation(log_p, jnp.where(both, log_p, 0) - jnp.where(both, log_q, 0), where=both)
    return jnp.where(jnp.any(in_p & ~in_q, axis=-1), jnp.inf, finite)


def between_laws(
    log_p: Float[Array, "*batch actions"],
    log_q: Float[Array, "*batch actions"],
    *,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch"]:
    r"""KL(p || q) of two *normalized* laws as :math:`\sum_a p \log\frac{p}{q} - p + q`, in nats.

    Every term is non-negative and as accurate as its logarithms, where :func:`categorical` sums
    terms of both signs: near p = q, in float32, that leaves no digit and at times the wrong sign.
    Of measures that are not normalized it is another divergence. Otherwise as
    :func:`categorical`.

    >>> p = jnp.log(jnp.array([0.2501, 0.7499]))
    >>> q = jnp.log(jnp.array([0.25, 0.75]))
    >>> float(between_laws(p, q))  # (1e-4)^2 / (2 * 3/16), to the digits of the input
    2.66...e-08
    """
    in_p, in_q = support(log_p, where), support(log_q, where)
    both = in_p & in_q
    p, q = (jnp.where(keep, x, 0) for keep, x in ((in_p, log_p), (in_q, log_q)))
    ratio = jnp.where(both, p - q, 0)
    # Where q is much the larger, p e^(-ratio) is q: the exponential alone would overflow.
    far = ratio < -1
    near = jnp.exp(p) * exp_remainder(jnp.where(far, 0, -ratio))
    term = jnp.where(far, jnp.exp(q) + jnp.exp(p) * (ratio - 1), near)
    term = jnp.where(both, term, jnp.where(in_q, jnp.exp(q), 0))
    finite = jnp.sum(term, axis=-1)
    return jnp.where(jnp.any(in_p & ~in_q, axis=-1), jnp.inf, finite)


def k1(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Unbiased estimate of KL(pi || ref) from samples of pi: the log-ratio itself.

    Can be negative. **Not a loss**: its expected gradient is 0.

    >>> float(k1(jnp.array(0.5)))
    0.5
    """
    return log_ratio


def k2(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Half the squared log-ratio: as a loss on samples of pi, the gradient of KL(pi || ref).

    As a value it is biased (right to second order in the log-ratio).

    >>> float(k2(jnp.array(0.5)))
    0.125
    """
    return log_ratio**2 / 2


def k3(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Unbiased, non-negative estimate of KL(pi || ref) from samples of pi.

    Usually of lower variance than :func:`k1`. **As a loss it is another one**: its expected
    gradient is that of KL(ref || pi).

    >>> float(k3(jnp.log(jnp.array(2.0))))  # 1/2 - 1 + log 2
    0.193...
    """
    return exp_remainder(-log_ratio)
