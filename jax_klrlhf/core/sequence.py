"""Padded sequences and the log-probability of a response.

Rows are padded on the right and carry their lengths. A mask comes from lengths, never from
``ids != pad``: where the pad token equals the end token, the latter drops the end from the loss.

Axes: ``batch`` (free leading axes), ``length`` (token positions).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jax_klrlhf.core.numerics import Scalar, at_least_float32, check_between


class Ragged(NamedTuple):
    """Token rows of unequal length, padded on the right.

    Prompts are ``ids [prompts, P]``; the K responses to each prompt are ``ids [prompts, K, C]``.
    """

    ids: Int[Array, "*batch length"]
    lengths: Int[Array, "*batch"]

    @property
    def mask(self) -> Bool[Array, "*batch length"]:
        """True at the true tokens of each row."""
        positions = jnp.arange(self.ids.shape[-1], dtype=self.lengths.dtype)
        return jnp.broadcast_to(positions, self.ids.shape) < self.lengths[..., None]


def pad(rows: Sequence[Sequence[int]], *, length: int | None = None, pad_id: int = 0) -> Ragged:
    """Token rows as one :class:`Ragged` ``[rows, length]``.

    ``length`` is that of the longest row by default. ValueError where a row is longer.

    >>> pad([[5, 6, 7], [8]]).ids.tolist()
    [[5, 6, 7], [8, 0, 0]]
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    longest = int(lengths.max(initial=0))
    if length is None:
        length = longest
    if longest > length:
        raise ValueError(
            f"a row has {longest} tokens, more than length={length}: cut it or raise the length."
        )
    ids = np.full((len(rows), length), pad_id, np.int32)
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = row
    return Ragged(jnp.asarray(ids), jnp.asarray(lengths))


def token_log_prob(
    logits: Float[Array, "*batch vocab"], tokens: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    r"""Log-probability of each token under the logits at its position, in float32 at least, nats.

    .. math:: \log p(t_l) = z_{l, t_l} - \log \sum_v e^{z_{l, v}}

    ``logits[..., l, :]`` must be the prediction *of* ``tokens[..., l]``: the shift by one is the
    caller's. Logits in bfloat16 are widened before the sum over the vocabulary. No array of the
    size of ``logits`` is kept besides ``logits``. Entries at padding are whatever the ids there
    say: mask them when summing.

    >>> logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0]]))
    >>> jnp.exp(token_log_prob(logits, jnp.array([1, 0]))).tolist()
    [0.75, 0.5]
    """
    logits = at_least_float32(logits)
    largest = lax.stop_gradient(jnp.max(logits, axis=-1))
    log_z = jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    # The shift comes off first: at logits of 1e4 adding it to log_z would cost three digits.
    return (chosen - largest) - log_z


def sum_log_prob(
    token_log_prob: Float[Array, "*batch length"], *, where: Bool[Array, "*batch length"]
) -> Float[Array, "*batch"]:
    r"""Log-probability of a response: the sum over its true tokens, in float32 at least, nats.

    ``where`` is :attr:`Ragged.mask`; what stands at a masked position (NaN included) has no effect
    on value or gradient. A response without tokens has log-probability 0. Sums are never taken in
    bfloat16, where 2048 of them lose more than half of the total.

    >>> float(sum_log_prob(jnp.array([-1.0, -2.0, -9.0]), where=jnp.array([True, True, False])))
    -3.0
    """
    return jnp.sum(jnp.where(where, at_least_float32(token_log_prob), 0), axis=-1)


def length_desensitized(
    token_log_prob: Float[Array, "*batch responses length"],
    lengths: Int[Array, "*batch responses"],
    *,
    tail: Scalar,
) -> Float[Array, "*batch responses"]:
    r"""LD-DPO's log-probabilities: what lies beyond the shorter response's length counts ``tail``.

    .. math:: \log \pi(a_{\le m}) + \alpha \log \pi(a_{> m}), \qquad m = \min(|a^w|, |a^l|)

    alpha = ``tail`` in [0, 1]; at 1 the sum over all tokens, at 0 a truncation. Law: none; with
    alpha < 1 it is no probability of a response. Source: arXiv 2409.06411; the paper's text was not
    at hand, so no equation is named.

    >>> token = jnp.array([[-1.0, -2.0, -4.0], [-1.0, -1.0, 9.0]])
    >>> length_desensitized(token, jnp.array([3, 2]), tail=0.5).tolist()
    [-5.0, -2.0]
    """
    check_between("tail", tail, 0, 1)
    place = jnp.broadcast_to(jnp.arange(token_log_prob.shape[-1]), token_log_prob.shape)
    inside = place < lengths[..., None]
    shared = place < jnp.min(lengths, -1)[..., None, None]
    kept = jnp.where(inside, at_least_float32(token_log_prob), 0)
    return jnp.sum(kept * jnp.where(shared, 1, jnp.asarray(tail, kept.dtype)), -1)
