"""Attention of one decoding step for TPU, read from the stacked cache where it lies.

XLA's TPU compiler copies a layer out of a stack of caches before it multiplies with it: what is
read once is read, written and read again. A Pallas kernel takes the whole stack and the layer's
number, and fetches that layer's blocks alone; of them only those that hold positions which are
seen. Keys of eight bits are widened in on-chip memory.

The prompt's keys and the responses' own are two calls of one kernel, each a softmax over its part,
joined by their log-sum-exps.

Axes: those of :mod:`.attention`, with ``L`` layers and ``R`` query rows of one key head.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Float, Int

from jax_klrlhf.models import partition
from jax_klrlhf.models.attention import Keys, Prompt
from jax_klrlhf.models.config import ModelConfig

BLOCK = 2**20
"""Bytes of keys that are fetched at one time, and as many of values."""
MOST = 64
"""Responses to a prompt whose keys fit in on-chip memory, 128 positions of each."""
LANES = 128
_LOWEST = float(jnp.finfo(jnp.float32).min)


class Part(NamedTuple):
    """A softmax over part of the keys."""

    out: Float[Array, "B N K R D"]
    log_total: Float[Array, "B N K R"]


def step(
    query: Float[Array, "B K H D"],
    own: Keys,
    prompt: Prompt,
    index: Int[Array, "*B"],
    layer: Int[Array, ""],
    *,
    scale: float,
    window: Int[Array, ""],
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B K H D"]:
    """:func:`.attention.step` from stacks of all layers: ``own [L, B, N, K, C, D]``, and
    ``prompt.keys [L, B, N, P, D]``. ``interpret`` runs the kernel's arithmetic on any device."""
    batch, samples, heads, size = query.shape
    groups = own.key.shape[2]
    query = (query * jnp.asarray(scale, query.dtype)).reshape(batch, samples, groups, -1, size)
    query = query.swapaxes(1, 2)
    run = functools.partial(_sharded, softcap=softcap, interpret=interpret)
    ends = jnp.broadcast_to(index + 1, (batch,))
    mine = run(query, own, layer, ends - window, ends)
    shared = jax.tree.map(lambda x: jnp.expand_dims(x, 3), prompt.keys)
    # All rows of a prompt's responses, as one matrix.
    rows = query.reshape(batch, groups, 1, -1, size)
    lengths = prompt.lengths.astype(jnp.int32)
    theirs = run(rows, shared, layer, lengths + ends - window, lengths)
    theirs = Part(
        theirs.out.reshape(mine.out.shape), theirs.log_total.reshape(mine.log_total.shape)
    )
    largest = jnp.maximum(mine.log_total, theirs.log_total)
    shares = [jnp.exp(part.log_total - largest)[..., None] for part in (mine, theirs)]
    out = (mine.out * shares[0] + theirs.out * shares[1]) / (shares[0] + shares[1])
    return out.swapaxes(1, 2).reshape(batch, samples, heads, size).astype(query.dtype)


def fits(config: ModelConfig, ids: Int[Array, "B K"]) -> bool:
    """Whether :func:`step` takes a token of so many responses."""
    return config.dtype.itemsize <= 4 and ids.shape[1] <= MOST


def _sharded(query, keys: Keys, layer, low, high, *, softcap, interpret) -> Part:
    """A kernel is opaque to the partitioner: run it on each device's prompts and heads."""
    function = functools.partial(attend, softcap=softcap, interpret=interpret)
    sizes = {axis: size for axis, size in partition.auto_axes().items() if size > 1}
    if not sizes:
        return function(query, keys, layer, low, high)
    rows = tuple(axis for axis in partition.ROWS if axis in sizes)
    if query.shape[0] % math.prod(sizes[axis] for axis in rows):
        rows = ()
    head = "tensor" if query.shape[1] % sizes.get("tensor", query.shape[1] + 1) == 0 else None
    stacked = jax.tree.map(lambda _: Spec(None, rows, head), keys)
    parts: Any = Part
    mapped = jax.shard_map(
        function,
        in_specs=(Spec(rows, head), stacked, Spec(), Spec(rows), Spec(rows)),
        out_specs=parts(Spec(rows, head), Spec(rows, head)),
        check_vma=False,
    )
    return mapped(query, keys, layer, low, high)


def attend(
    query: Float[Array, "B N K R D"],
    keys: Keys,
    layer: Int[Array, ""],
    low: Int[Array, " B"],
    high: Int[Array, " B"],
    *,
    softcap: float | None = None,
    interpret: bool = False,
) -> Part:
    """Of layer ``layer`` of ``keys [L, B, N, K, S, D]``, positions ``low`` to ``high`` (itself
    not), with scores that ``query`` is scaled for. Where there are none ``out`` is 0 and
    ``log_total`` the lowest number."""
    batch, groups, samples, rows, size = query.shape
    length = keys.key.shape[-2]
    one = samples * size * keys.key.dtype.itemsize
    block = min(length, max(LANES, BLOCK // one // LANES * LANES))

    def at(b, n, s, layer, low, high):
        """Blocks beyond what is seen are not fetched: an index that stays fetches nothing."""
        last = jnp.maximum(high[b] - 1, 0) // block
        first = jnp.minimum(jnp.maximum(low[b], 0) // block, last)
        return layer[0], b, n, 0, jnp.clip(s, first, last), 0

    def row(b, n, s, *_):
        del s
        return b, n, 0, 0, 0

    matrix = pl.BlockSpec((None, None, None, samples, block, size), at)
    scales = pl.BlockSpec((None, None, None, samples, block), lambda *args: at(*args)[:-1])
    many = pl.BlockSpec((None, None, samples, rows, size), row)
    lanes = pl.BlockSpec((None, None, samples, rows, LANES), row)
    eight = keys.key_scale is not None
    entries = batch * groups * samples * rows * length
    out, log_total = pl.pallas_call(
        functools.partial(_kernel, block=block, length=length, softcap=softcap, eight=eight),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, groups, pl.cdiv(length, block)),
            in_specs=[many, matrix, matrix, *([scales] * 2 if eight else [])],
            out_specs=[many, lanes],
            scratch_shapes=[
                pltpu.VMEM((samples, rows, size), jnp.float32),
                pltpu.VMEM((samples, rows, LANES), jnp.float32),
                pltpu.VMEM((samples, rows, LANES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, jnp.float32),
            jax.ShapeDtypeStruct((*query.shape[:-1], LANES), jnp.float32),
        ],
        # As if all were filled.
        cost_estimate=pl.CostEstimate(
            flops=4 * entries * size,
            transcendentals=entries,
            bytes_accessed=sum(x.nbytes // len(x) for x in jax.tree.leaves(keys))
            + query.nbytes
            + query.size * 4 * 2,
        ),
        interpret=interpret,
        name="decode_attention",
    )(layer[None], low, high, query, *jax.tree.leaves(keys))
    return Part(out, log_total[..., 0])


def _kernel(layer, low, high, query, key, value, *rest, block, length, softcap, eight):
    """One block of positions of all responses: a running softmax over the blocks."""
    del layer
    scales: Any = rest[:2] if eight else ()
    out, log_total, mixed, top, total = rest[-5:]
    number, at = pl.program_id(0), pl.program_id(2)
    begin, (samples, rows, _) = at * block, query.shape
    low, high = low[number], high[number]

    @pl.when(at == 0)
    def _():
        mixed[...] = jnp.zeros(mixed.shape, jnp.float32)
        top[...] = jnp.full(top.shape, _LOWEST)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    @pl.when((begin < high) & (begin + block > low))
    def _():
        place = begin + jax.lax.broadcasted_iota(jnp.int32, (rows, block), 1)
        keep = (place >= low) & (place < high)
        # The last block may reach beyond the array, where anything may lie.
        inside = begin + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < length
        for k in range(samples):
            mine = query[k]
            contract = (((1,), (1,)), ((), ()))
            raw = jax.lax.dot_general(
                mine, key[k].astype(mine.dtype), contract, preferred_element_type=jnp.float32
            )
            if eight:
                raw *= scales[0][k : k + 1]
            if softcap is not None:
                raw = softcap * jnp.tanh(raw / softcap)
            raw = jnp.where(keep, raw, _LOWEST)
            before = top[k][:, :1]
            largest = jnp.maximum(before, raw.max(-1, keepdims=True))
            weight = jnp.where(keep, jnp.exp(raw - largest), 0)
            kept = jnp.exp(before - largest)
            total[k] = total[k] * kept + weight.sum(-1, keepdims=True)
            top[k] = jnp.broadcast_to(largest, (rows, LANES))
            if eight:
                weight = jnp.where(keep, weight * scales[1][k : k + 1], 0)
            values = value[k].astype(mine.dtype)
            if length % block:
                values = jnp.where(inside, values, jnp.zeros_like(values))
            part = jnp.dot(weight.astype(mine.dtype), values, preferred_element_type=jnp.float32)
            mixed[k] = mixed[k] * kept + part

    @pl.when(at == pl.num_programs(2) - 1)
    def _():
        seen = total[...] > 0
        out[...] = mixed[...] / jnp.where(seen, total[...], 1)[..., :1]
        log_total[...] = jnp.where(seen, top[...] + jnp.log(total[...]), _LOWEST)
