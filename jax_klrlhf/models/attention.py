"""Attention of responses to their shared prompt and to themselves, in one exact softmax.

For response ``k`` to a prompt of true length ``n``, the query of its token ``i`` stands at
position ``n + i`` and sees the prompt's keys ``p < n`` and its own keys ``j <= i``; a window ``w``
keeps those at most ``w - 1`` positions back. A prompt itself is a single response to an empty
prompt. Key heads serve groups of query heads and are never repeated in memory.

Axes: ``B`` prompts, ``K`` responses, ``T`` response positions, ``P`` prompt positions, ``H`` query
heads, ``N`` key heads (``G = H / N``), ``D`` head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK = 64
"""Queries per block of the XLA form."""
EVERYTHING = 2**30
"""A window wider than any sequence."""


class Keys(NamedTuple):
    """Keys and values, heads before positions: the layout that batched products want."""

    key: Float[Array, "*batch N S D"]
    value: Float[Array, "*batch N S D"]


class Prompt(NamedTuple):
    """The prompt as the responses see it: keys ``[B, N, P, D]`` and true lengths ``[B]``."""

    keys: Keys
    lengths: Int[Array, " B"]


def xla(
    query: Float[Array, "B K T H D"],
    own: Keys,
    prompt: Prompt | None,
    *,
    scale: float,
    window: Int[Array, ""],
    softcap: float | None = None,
) -> Float[Array, "B K T H D"]:
    """Blocks of 64 queries, each against the keys up to its last one only.

    The blocks are unrolled, so that the upper triangle is never computed; on CPU this is 2 to 4
    times faster than one masked product, forward and backward. ``own`` is ``[B, K, N, T, D]``.
    """
    batch, samples, length, heads, size = query.shape
    groups = own.key.shape[2]
    split = query.transpose(0, 1, 3, 2, 4).reshape(
        batch, samples, groups, heads // groups, length, size
    )
    blocks = []
    for begin in range(0, length, CHUNK):
        end = min(begin + CHUNK, length)
        rows, columns = jnp.arange(begin, end), jnp.arange(end)
        back = rows[:, None] - columns[None]
        mask = ((back >= 0) & (back < window))[None, None, None, None]
        seen = Keys(own.key[..., :end, :], own.value[..., :end, :])
        blocks.append(
            _joint(
                split[..., begin:end, :],
                seen,
                mask,
                prompt,
                None if prompt is None else _prompt_mask(prompt, rows, window),
                scale=scale,
                softcap=softcap,
            )
        )
    joined = jnp.concatenate(blocks, axis=-2)
    return joined.reshape(batch, samples, heads, length, size).transpose(0, 1, 3, 2, 4)


def step(
    query: Float[Array, "B K H D"],
    own: Keys,
    prompt: Prompt,
    index: Int[Array, ""],
    *,
    scale: float,
    window: Int[Array, ""],
    softcap: float | None = None,
) -> Float[Array, "B K H D"]:
    """One query per response, number ``index``, against its cache ``[B, K, N, C, D]``.

    The prompt's keys are read once for the K responses.
    """
    batch, samples, heads, size = query.shape
    groups = own.key.shape[2]
    split = query.reshape(batch, samples, groups, heads // groups, 1, size)
    back = index - jnp.arange(own.key.shape[-2])
    mask = ((back >= 0) & (back < window))[None, None, None, None, None]
    rows = index[None]
    out = _joint(
        split,
        own,
        mask,
        prompt,
        _prompt_mask(prompt, rows, window),
        scale=scale,
        softcap=softcap,
    )
    return out.reshape(batch, samples, heads, size)


def _prompt_mask(
    prompt: Prompt, rows: Int[Array, " T"], window: Int[Array, ""]
) -> Bool[Array, "B 1 1 1 T P"]:
    columns = jnp.arange(prompt.keys.key.shape[-2])
    lengths = prompt.lengths[:, None, None]
    back = lengths + rows[None, :, None] - columns[None, None, :]
    mask = (columns[None, None, :] < lengths) & (back < window)
    return mask[:, None, None, None]


def _joint(query, own, mask, prompt, prompt_mask, *, scale, softcap):
    """One softmax over the prompt's keys and the response's own: queries ``[B, K, N, G, T, D]``."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query = query * jnp.asarray(scale, query.dtype)

    def scores(keys, equation, keep):
        raw = jnp.einsum(equation, query, keys, preferred_element_type=wide)
        if softcap is not None:
            raw = softcap * jnp.tanh(raw / softcap)
        return jnp.where(keep, raw, jnp.finfo(wide).min)

    parts = [scores(own.key, "bkngtd,bknsd->bkngts", mask)]
    if prompt is not None:
        parts.insert(0, scores(prompt.keys.key, "bkngtd,bnsd->bkngts", prompt_mask))
    weights = jax.nn.softmax(jnp.concatenate(parts, axis=-1), axis=-1).astype(query.dtype)
    border = weights.shape[-1] - own.key.shape[-2]
    out = jnp.einsum("bkngts,bknsd->bkngtd", weights[..., border:], own.value)
    if prompt is not None:
        out += jnp.einsum("bkngts,bnsd->bkngtd", weights[..., :border], prompt.keys.value)
    return out
