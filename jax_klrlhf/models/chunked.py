"""Chunked prefill (Sarathi, arXiv 2308.16369): a long prompt read in pieces, each after the last.

What a layer makes besides keys and values then exists for one piece at a time. Every piece looks at
the whole room for keys: loops that look at quarters of it would save attention, and TPU's compiler
took 395 s for them in place of 54 to 150, for 0.6 GiB more.

Axes: ``B`` prompts, ``P`` prompt positions, ``E`` hidden size; keys ``[L, B, N, P, D]``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models.base import Prefix

Read = Callable[[Array, Array, Any, Array], tuple[Array, Any]]
"""``read(ids [B, S], positions [B, S], keys, before [B]) -> (hidden [B, S, E], their keys)``: a
piece whose prompt so far is the first ``before`` of ``keys``."""


def prefill(
    read: Read,
    prompts: Ragged,
    *,
    chunk: int,
    room: Callable[[int], tuple[Any, Float[Array, "B E"]]],
) -> Prefix:
    """The prefix of ``prompts``, in the fewest pieces of ``chunk`` tokens at most.

    ``room(size)`` gives zeros for the keys of ``size`` positions and for the last hidden states.
    """
    rows, width = prompts.ids.shape
    count = -(-width // chunk)
    size = -(-width // count)
    ids = jnp.pad(prompts.ids, ((0, 0), (0, count * size - width)))
    lengths = prompts.lengths.astype(jnp.int32)
    last = jnp.maximum(lengths - 1, 0)

    def step(carry: Any, number: Int[Array, ""]) -> tuple[Any, None]:
        keys, hidden = carry
        begin = number * size
        mine = jax.lax.dynamic_slice_in_dim(ids, begin, size, axis=1)
        positions = begin + jnp.arange(size, dtype=jnp.int32)[None]
        # Where a prompt has ended, nobody reads what stands here.
        out, new = read(mine, jnp.broadcast_to(positions, mine.shape), keys, jnp.full(rows, begin))
        keys = jax.tree.map(
            lambda whole, x: jax.lax.dynamic_update_slice_in_dim(whole, x, begin, axis=3), keys, new
        )
        at = last - begin
        found = jnp.take_along_axis(out, jnp.clip(at, 0, size - 1)[:, None, None], axis=1)[:, 0]
        here = (at >= 0) & (at < size)
        return (keys, jnp.where(here[:, None], found, hidden)), None

    numbers = jnp.arange(count, dtype=jnp.int32)
    (keys, hidden), _ = jax.lax.scan(step, room(count * size), numbers)
    return Prefix(hidden, jax.tree.map(lambda x: x[..., :width, :], keys), lengths)
