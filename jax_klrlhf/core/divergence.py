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

k2 is the surrogate of the reverse KL, k3 its value and the forward KL's surrogate: two members of
the families that every :class:`.fdivergence.FDivergence` has. So report k1 or k3, and differentiate
k2. (In a score-function estimator the divergence stands as a
constant times the score, and there the value is what counts: k1 or k3.)

Axes: ``batch`` (free leading axes), ``actions`` (what is chosen among, always last).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jax_klrlhf.core.fdivergence import reverse_kl
from jax_klrlhf.core.numerics import expectation, support


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
    return reverse_kl.surrogate(log_ratio)


def k3(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Unbiased, non-negative estimate of KL(pi || ref) from samples of pi.

    Usually of lower variance than :func:`k1`. **As a loss it is another one**: its expected
    gradient is that of KL(ref || pi).

    >>> float(k3(jnp.log(jnp.array(2.0))))  # 1/2 - 1 + log 2
    0.193...
    """
    return reverse_kl.value(log_ratio)
