r"""Guidance at inference: values of prefixes turn pi0 into the Gibbs policy, token by token (I).

.. math:: V(s) = \eta \log \sum_t \pi_0(t | s)\, e^{V(s t)/\eta}, \qquad
          \pi(t | s) = \pi_0(t | s)\, e^{(V(s t) - V(s))/\eta}

With V the *soft* value (of a whole response: its reward) the token-wise law is exactly the Gibbs
law of whole responses: one level of the tree is :func:`gibbs.free_energy`, and the log-ratios of a
path sum to (r - V(root)) / eta. With the *mean* value :math:`E_{\pi_0}[r | s]` in V's place (FUDGE
2104.05218, controlled decoding 2310.17022) it is another law, below the frontier of reward and KL
[derived; tests on the exact language bandit].

:func:`resample` makes a particle method of it: draws of pi0 extended in step and resampled by how
their twist grows. It is unbiased for Z with any twist; the soft value makes it exact.

Axes: ``batch`` (free: prefixes), ``vocab`` (what follows, last), ``particles``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jax_klrlhf.core import gibbs, numerics
from jax_klrlhf.core.numerics import Scalar


def soft_value(
    log_prob: Float[Array, "*batch vocab"],
    value: Float[Array, "*batch vocab"],
    *,
    kl_coef: Scalar,
    where: Bool[Array, "*batch vocab"] | None = None,
) -> Float[Array, "*batch"]:
    r"""V of a prefix from V of its continuations: :math:`\eta \log E_{\pi_0} e^{V/\eta}`.

    One backward step over a tree of prefixes; :func:`gibbs.free_energy` under another name.

    >>> float(soft_value(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([3.0, 1.0])), kl_coef=1))
    0.693...
    """
    return gibbs.free_energy(value, log_prob, kl_coef=kl_coef, where=where)


def mean_value(
    log_prob: Float[Array, "*batch vocab"],
    value: Float[Array, "*batch vocab"],
    *,
    where: Bool[Array, "*batch vocab"] | None = None,
) -> Float[Array, "*batch"]:
    """E_pi0 of the continuations' values: what a value head by regression learns. Not the soft one.

    >>> float(mean_value(jnp.log(jnp.array([0.5, 0.5])), jnp.array([3.0, 1.0])))
    2.0
    """
    return numerics.expectation(log_prob, value, where=where)


def log_prob(
    ref_log_prob: Float[Array, "*batch vocab"],
    value: Float[Array, "*batch vocab"],
    *,
    kl_coef: Scalar,
    where: Bool[Array, "*batch vocab"] | None = None,
) -> Float[Array, "*batch vocab"]:
    r"""The guided law of the next token, :math:`\pi_0(t|s) e^{V(st)/\eta}`, normalized.

    With soft values nothing is left to normalize but V(s); with any other it is the best policy
    one step ahead. :func:`gibbs.log_prob` on tokens.

    >>> uniform = jnp.log(jnp.array([0.5, 0.5]))
    >>> jnp.exp(log_prob(uniform, jnp.log(jnp.array([3.0, 1.0])), kl_coef=1.0)).tolist()
    [0.75, 0.25]
    """
    return gibbs.log_prob(value, ref_log_prob, kl_coef=kl_coef, where=where)


def resample(
    key: Key[Array, ""], log_weight: Float[Array, "*batch particles"]
) -> tuple[Int[Array, "*batch particles"], Float[Array, "*batch"]]:
    """Systematic resampling: ancestors of equal weight, and the log of the mean weight.

    ``log_weight`` is the growth of each particle's twist since the last resampling, over eta
    (at the end: the reward's). The product of the mean weights over a run estimates Z without bias.
    One uniform number serves a row, so each particle has floor or ceil of its share of children.
    With one particle nothing is changed: its law is pi0's.

    >>> ancestors, log_mean = resample(jax.random.key(0), jnp.log(jnp.array([0.0, 4.0])))
    >>> ancestors.tolist(), round(float(log_mean), 4)
    ([1, 1], 0.6931)
    """
    count = log_weight.shape[-1]
    top = jnp.max(log_weight, -1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0)
    weight = jnp.exp(log_weight - top)
    total = jnp.sum(weight, -1, keepdims=True)
    alive = total > 0
    share = jnp.where(alive, weight / jnp.where(alive, total, 1), 1 / count)
    cumulative = jnp.cumsum(share, -1)
    start = jax.random.uniform(key, (*log_weight.shape[:-1], 1), log_weight.dtype)
    # Scaled to stay below the total, so that rounding never picks a particle without weight.
    limit = cumulative[..., -1:] * (1 - jnp.finfo(log_weight.dtype).eps)
    steps = jnp.arange(count).astype(log_weight.dtype)
    points = (start + jnp.broadcast_to(steps, log_weight.shape)) / count * limit
    at = jnp.sum(cumulative[..., None, :] <= points[..., :, None], -1, dtype=jnp.int32)
    log_mean = jnp.where(alive, jnp.log(jnp.where(alive, total, 1)), -jnp.inf) - jnp.log(count)
    return at, (log_mean + top)[..., 0]
