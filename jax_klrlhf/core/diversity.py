r"""How diverse a policy, a set of responses, or a matrix of states is.

Entropies in nats; the others are effective numbers, exp of an entropy: "as diverse as that many
equal, unrelated things".

Axes: ``batch`` (free), ``contexts``, ``actions``, ``n`` (items), ``vocab``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_klrlhf.core import numerics, reshape


def entropy(log_prob: Float[Array, "*batch actions"]) -> Float[Array, "*batch"]:
    """Entropy in nats.

    >>> float(entropy(jnp.log(jnp.array([0.5, 0.5, 0.0]))))  # log 2
    0.693...
    """
    return -numerics.expectation(log_prob, log_prob)


def per_input(
    log_prob: Float[Array, "contexts actions"], context_prob: Float[Array, " contexts"]
) -> Float[Array, ""]:
    """Mean entropy of a context's actions: diversity for one prompt (arXiv 2310.06452)."""
    return jnp.sum(context_prob * entropy(log_prob))


def across_inputs(
    log_prob: Float[Array, "contexts actions"], context_prob: Float[Array, " contexts"]
) -> Float[Array, ""]:
    """Entropy of the mean law: diversity over prompts, at least :func:`per_input`.

    Actions must mean the same in all contexts. The difference is the mutual information of context
    and action; "mode collapse" is a small sum, not only a small first term.
    """
    return entropy(jax.nn.logsumexp(log_prob + jnp.log(context_prob)[:, None], axis=0))


def class_entropy(
    log_prob: Float[Array, "*batch actions"], classes: Int[Array, "*batch actions"]
) -> Float[Array, "*batch"]:
    """Entropy of the classes (meanings) of the actions: semantic entropy, in nats."""
    return numerics.expectation(log_prob, reshape.surprise(log_prob, classes))


def vendi(
    kernel: Float[Array, "*batch n n"], prob: Float[Array, "*batch n"] | None = None
) -> Float[Array, "*batch"]:
    r"""Vendi score: exp of the entropy of the eigenvalues of :math:`\sqrt{p}\, K \sqrt{p}`.

    ``kernel`` is a similarity with ones on its diagonal; items are equally likely unless ``prob``
    is given. n for unrelated items, 1 for n copies of one. Source: arXiv 2210.02410, eq. 3.
    """
    n = kernel.shape[-1]
    prob = jnp.full(kernel.shape[:-1], 1 / n, kernel.dtype) if prob is None else prob
    root = numerics.safe_sqrt(prob)
    values = jnp.linalg.eigvalsh(root[..., :, None] * kernel * root[..., None, :])
    return jnp.exp(_entropy_of_shares(values))


def effective_rank(matrix: Float[Array, "*batch rows columns"]) -> Float[Array, "*batch"]:
    """Exp of the entropy of the singular values' shares (Roy and Vetterli, 2007; VERL's of states).

    >>> round(float(effective_rank(jnp.eye(3))), 4)
    3.0
    """
    return jnp.exp(_entropy_of_shares(jnp.linalg.svd(matrix, compute_uv=False)))


def _entropy_of_shares(values: Array) -> Array:
    values = jnp.maximum(values, 0)
    total = jnp.sum(values, -1, keepdims=True)
    share = values / jnp.where(total > 0, total, 1)
    return -jnp.sum(jax.scipy.special.xlogy(share, share), -1)


class Top(NamedTuple):
    """Of the k likeliest entries: the entropy of their renormalized law, and their total mass."""

    entropy: Float[Array, "*batch"]
    mass: Float[Array, "*batch"]


def top(log_prob: Float[Array, "*batch vocab"], *, k: int) -> Top:
    """Entropy (nats) and mass of the top k: the per-token warnings of arXiv 2410.11677.

    There the two fall as likelihood is over-optimized. On whole responses they did not mark the
    peak when tried: the entropy falls from the first step, and the mass rises.
    """
    if not 1 <= k <= log_prob.shape[-1]:
        raise ValueError(f"k must be in 1..{log_prob.shape[-1]}, got {k}")
    best = jax.lax.top_k(log_prob, k)[0]
    total = jax.nn.logsumexp(best, axis=-1)
    return Top(entropy(best - total[..., None]), jnp.exp(total))
