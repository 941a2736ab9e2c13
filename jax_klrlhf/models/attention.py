"""Attention of responses to their shared prompt and to themselves, in one exact softmax.

For response ``k`` to a prompt of true length ``n``, the query of its token ``i`` stands at
position ``n + i`` and sees the prompt's keys ``p < n`` and its own keys ``j <= i``; a window ``w``
keeps those at most ``w - 1`` positions back. A prompt itself is a single response to an empty
prompt. Key heads serve groups of query heads and are never repeated in memory.

Three implementations of the same function, one signature: :func:`xla` (any device; the form that
CPUs run fast), :func:`splash` (TPU) and :func:`cudnn` (NVIDIA GPU). :func:`by_platform` chooses.

Axes: ``B`` prompts, ``K`` responses, ``T`` response positions, ``P`` prompt positions, ``H`` query
heads, ``N`` key heads (``G = H / N``), ``D`` head size.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Bool, Float, Int, Int8

from jax_klrlhf.models import quantized
from jax_klrlhf.models.config import wide

CHUNK = 64
"""Queries per block of the XLA form."""
EVERYTHING = 2**30
"""A window wider than any sequence."""


class Keys(NamedTuple):
    """Keys and values, heads before positions: the layout that batched products want.

    In eight bits (:func:`eight`, for decoding alone) each head has a scale at each position.
    """

    key: Float[Array, "*batch N S D"] | Int8[Array, "*batch N S D"]
    value: Float[Array, "*batch N S D"] | Int8[Array, "*batch N S D"]
    key_scale: Float[Array, "*batch N S"] | None = None
    value_scale: Float[Array, "*batch N S"] | None = None


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
    windows: Sequence[int | None] = (),
    softcap: float | None = None,
) -> Float[Array, "B K T H D"]:
    """Blocks of 64 queries, each against the keys up to its last one only.

    The blocks are unrolled, so that the upper triangle is never computed; on CPU this is 2 to 4
    times faster than one masked product, forward and backward. ``own`` is ``[B, K, N, T, D]``.
    ``window`` may be traced, so ``windows`` (all that it can be) is not needed here.
    """
    del windows
    batch, samples, length, heads, size = query.shape
    groups = own.key.shape[2]
    split = query.transpose(0, 1, 3, 2, 4).reshape(
        batch, samples, groups, heads // groups, length, size
    )
    blocks = []
    for begin in range(0, length, CHUNK):
        end = min(begin + CHUNK, length)
        rows = jnp.arange(begin, end, dtype=jnp.int32)
        back = rows[:, None] - jnp.arange(end, dtype=jnp.int32)[None]
        mask = ((back >= 0) & (back < window))[None, None, None, None]
        seen = Keys(own.key[..., :end, :], own.value[..., :end, :])
        blocks.append(
            _joint(
                split[..., begin:end, :],
                seen,
                mask,
                prompt,
                None if prompt is None else _prompt_mask(prompt, rows[None], window),
                scale=scale,
                softcap=softcap,
            )
        )
    joined = jnp.concatenate(blocks, axis=-2)
    return joined.reshape(batch, samples, heads, length, size).transpose(0, 1, 3, 2, 4)


def splash(
    query: Float[Array, "B K T H D"],
    own: Keys,
    prompt: Prompt | None,
    *,
    scale: float,
    window: Int[Array, ""],
    windows: Sequence[int | None] = (None,),
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B K T H D"]:
    """JAX's splash attention for TPU: one kernel over prompt and responses, empty blocks skipped.

    Prompts are moved to the right end of their padding. A response's token ``i`` is then ``i``
    places after the prompt's last slot whatever the prompt's length, so windows and the separation
    of the K responses are one static mask, and only the prompt's left padding is left to segment
    ids. ``windows`` are the values that ``window`` can take: a kernel is made for each.
    ``interpret`` runs the kernel's arithmetic on any device.
    """
    batch, samples, length, heads, size = query.shape
    groups = own.key.shape[2]
    rows = _round_up(length)

    def flat(x):  # [B, K, N, T, D] -> [B, N, K * rows, D]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, rows - length), (0, 0)))
        return x.swapaxes(1, 2).reshape(batch, x.shape[2], samples * rows, size)

    mine = jax.tree.map(flat, own)
    seen = jnp.ones((batch, samples * rows), jnp.int32)
    columns = 0
    if prompt is not None:
        columns = _round_up(prompt.keys.key.shape[-2])
        slots = jnp.arange(columns, dtype=jnp.int32)[None] - (columns - prompt.lengths[:, None])
        ids = jnp.maximum(slots, 0)[:, None, :, None]

        def right(x):
            return jnp.take_along_axis(x, ids, axis=2)

        shared = jax.tree.map(right, prompt.keys)
        mine = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), shared, mine)
        seen = jnp.concatenate([(slots >= 0).astype(jnp.int32), seen], axis=1)

    def run(kind):
        mask = SharedPromptMask(samples, rows, columns, kind)

        def rowwise(query, key, value, kv_ids):
            attend = _splash_kernel(mask, query.shape[1], softcap, interpret)

            def one(query, key, value, kv_ids):
                ids = kernel.SegmentIds(q=jnp.ones((samples * rows,), jnp.int32), kv=kv_ids)
                return attend(query, key, value, segment_ids=ids)

            return jax.vmap(one)(query, key, value, kv_ids)

        return _per_device(rowwise, groups)

    scaled = flat((query * jnp.asarray(scale, query.dtype)).swapaxes(2, 3))
    choices = [run(kind) for kind in windows]
    kinds = [EVERYTHING if w is None else w for w in windows]
    which = jnp.asarray(kinds, jnp.int32) == window
    out = jax.lax.switch(jnp.argmax(which), choices, scaled, mine.key, mine.value, seen)
    out = out.reshape(batch, heads, samples, rows, size)[..., :length, :]
    return out.transpose(0, 2, 3, 1, 4).astype(query.dtype)


class SharedPromptMask(masks.Mask):
    """Which of ``[P prompt keys, K * rows own keys]`` the ``K * rows`` queries see, made lazily."""

    def __init__(self, samples: int, rows: int, columns: int, window: int | None):
        self._facts = samples, rows, columns, window

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys."""
        samples, rows, columns, _ = self._facts
        return samples * rows, columns + samples * rows

    def __getitem__(self, index) -> np.ndarray:
        _, rows, columns, window = self._facts
        query, key = (np.arange(n)[i] for n, i in zip(self.shape, index, strict=True))
        query, key = query[:, None], key[None]
        place = query % rows
        mine = (key - columns) // rows == query // rows
        back = np.where(key < columns, columns + place - key, place - (key - columns) % rows)
        mask = ((key < columns) | mine) & (back >= 0)
        return mask if window is None else mask & (back < window)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharedPromptMask) and self._facts == other._facts

    def __hash__(self) -> int:
        return hash(self._facts)


def _splash_kernel(mask: SharedPromptMask, heads: int, softcap: float | None, interpret: bool):
    _, rows, columns, _ = mask._facts
    block = next(b for b in (512, 256, 128) if rows % b == 0 and columns % b == 0)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernel.make_splash_mha_single_device(
        mask=masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )


def _per_device(function, groups: int):
    """A kernel is opaque to the partitioner: run it on each device's prompts and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    auto = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and mesh.shape[name] > 1
    ]
    if not auto:
        return function

    def sharded(query, key, value, ids):
        batch = tuple(a for a in ("data", "fsdp") if a in auto)
        if query.shape[0] % max(1, int(np.prod([mesh.shape[a] for a in batch]))):
            batch = ()
        head = "tensor" if "tensor" in auto and groups % mesh.shape["tensor"] == 0 else None
        by_head = Spec(batch, head, None, None)
        mapped = jax.shard_map(
            function,
            in_specs=(by_head, by_head, by_head, Spec(batch, None)),
            out_specs=by_head,
            check_vma=False,
        )
        return mapped(query, key, value, ids)

    return sharded


def _round_up(length: int) -> int:
    return -(-length // 128) * 128


def cudnn(
    query: Float[Array, "B K T H D"],
    own: Keys,
    prompt: Prompt | None,
    *,
    scale: float,
    window: Int[Array, ""],
    windows: Sequence[int | None] = (None,),
    softcap: float | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B K T H D"]:
    """cuDNN's fused attention for NVIDIA GPUs, in 16 bits and without a soft cap.

    Each response is a row whose keys are the prompt's and its own. cuDNN takes one set of keys a
    row, so the prompt's are repeated K times for the time of one layer; scores never are in memory.
    A prompt by itself runs as plain causal attention.

    Raises ``ValueError`` with a soft cap, which cuDNN has not: use :func:`xla`.
    """
    if softcap is not None:
        raise ValueError(f"softcap={softcap}: cuDNN has no soft cap; use attention.xla")
    batch, samples, length, heads, size = query.shape
    groups = own.key.shape[2]
    settings = {"scale": scale, "implementation": implementation}

    def row(x):  # [B, K, N, S, D] -> [B * K, S, N, D]
        return x.swapaxes(2, 3).reshape(batch * samples, x.shape[3], groups, size)

    query = query.reshape(batch * samples, length, heads, size)
    place = jnp.arange(length, dtype=jnp.int32)
    back = place[:, None] - place[None]
    if prompt is None and tuple(windows) == (None,):
        out = jax.nn.dot_product_attention(
            query, row(own.key), row(own.value), is_causal=True, **settings
        )
    else:
        mask = jnp.broadcast_to((back >= 0) & (back < window), (batch, samples, 1, length, length))
        if prompt is not None:
            shared = _prompt_mask(prompt, place[None], window)[:, :, 0]
            shape = (batch, samples, 1, *shared.shape[-2:])
            mask = jnp.concatenate([jnp.broadcast_to(shared, shape), mask], axis=-1)

            def joined(common, mine):
                common = jnp.broadcast_to(common[:, None], (batch, samples, *common.shape[1:]))
                return jnp.concatenate([common, mine], axis=-2)

            own = jax.tree.map(joined, prompt.keys, own)
        mask = mask.reshape(batch * samples, *mask.shape[2:])
        out = jax.nn.dot_product_attention(
            query, row(own.key), row(own.value), mask=mask, **settings
        )
    return out.reshape(batch, samples, length, heads, size)


def by_platform(
    query: Float[Array, "B K T H D"],
    own: Keys,
    prompt: Prompt | None,
    *,
    scale: float,
    window: Int[Array, ""],
    windows: Sequence[int | None] = (None,),
    softcap: float | None = None,
    platform: str | None = None,
) -> Float[Array, "B K T H D"]:
    """The implementation for a platform (JAX's default backend, where None) and these shapes."""
    platform, size = platform or jax.default_backend(), query.shape[-1]
    chosen = xla
    if platform == "tpu" and query.shape[2] >= 128 and query.dtype.itemsize <= 4:
        chosen = splash
    fits = query.dtype.itemsize == 2 and size % 8 == 0 and size <= 128
    if platform == "gpu" and softcap is None and fits:
        chosen = cudnn
    return chosen(query, own, prompt, scale=scale, window=window, windows=windows, softcap=softcap)


def eight(keys: Keys) -> Keys:
    """``keys`` in eight bits: :func:`.quantized.quantize` of each head at each position."""
    key, value = (quantized.quantize(x, (-1,)) for x in (keys.key, keys.value))
    return Keys(key.values, value.values, key.scale, value.scale)


def written(
    cache: Keys, new: Keys, index: Int[Array, "*B"], layer: Int[Array, ""] | None = None
) -> Keys:
    """``cache [B, N, K, C, D]`` with position ``index``, of all or ``[B]`` of each, replaced by
    ``new [B, N, K, 1, D]``; with a layer, that one of a stack of caches."""
    if index.ndim:
        axis = 0 if layer is None else 1

        # A map, not an index of rows: so the partitioner knows that no row is another's.
        def of_row(cache: Keys, new: Keys, index: Int[Array, ""]) -> Keys:
            cache, new = (
                jax.tree.map(lambda x, axis=axis: jnp.expand_dims(x, axis), x)
                for x, axis in ((cache, axis), (new, 0))
            )
            return jax.tree.map(lambda x: x.squeeze(axis), written(cache, new, index, layer))

        return jax.vmap(of_row, in_axes=(axis, 0, 0), out_axes=axis)(cache, new, index)
    zero = jnp.int32(0)
    start = (*(() if layer is None else (layer,)), zero, zero, zero, index, zero)

    def put(whole, part):
        part = part if layer is None else part[None]
        return jax.lax.dynamic_update_slice(whole, part, start[: whole.ndim])

    return jax.tree.map(put, cache, new)


def longer(cache: Keys, *, room: int) -> Keys:
    """``cache [..., C, D]`` with ``room`` for more positions."""

    def pad(x, axis):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, room - cache.key.shape[-2])
        return jnp.pad(x, widths)

    # Scales have no axis of a head's size.
    scales = (None if scale is None else pad(scale, -1) for scale in cache[2:])
    return Keys(pad(cache.key, -2), pad(cache.value, -2), *scales)


def step(
    query: Float[Array, "B K H D"],
    own: Keys,
    prompt: Prompt,
    index: Int[Array, "*B"],
    *,
    scale: float,
    window: Int[Array, ""],
    softcap: float | None = None,
) -> Float[Array, "B K H D"]:
    """One query per response, number ``index`` (of all, or ``[B]``), against its cache
    ``[B, N, K, C, D]``.

    The prompt's keys are read once for the K responses. Heads come before responses, so that the
    queries of a prompt are the rows of one matrix for it without being moved: a fifth less time on
    CPU than responses first.
    """
    batch, samples, heads, size = query.shape
    groups = own.key.shape[1]
    dtype = wide(query.dtype)
    query = (query * jnp.asarray(scale, query.dtype)).reshape(batch, samples, groups, -1, size)
    query = query.swapaxes(1, 2)
    apart = query.shape[:-1]
    together = (batch, groups, -1)

    def scaled(x, scale):
        """Eight bits' scales ``[..., S]`` where ``x [..., rows, S]`` is summed over them, or is."""
        return x if scale is None else x * scale[..., None, :].astype(x.dtype)

    def product(equation, query, keys):
        return jnp.einsum(equation, query, keys.astype(query.dtype), preferred_element_type=dtype)

    def scores(equation, query, keys, keep):
        raw = scaled(product(equation, query, keys.key), keys.key_scale)
        if softcap is not None:
            raw = softcap * jnp.tanh(raw / softcap)
        return jnp.where(keep, raw, jnp.finfo(dtype).min)

    index = jnp.atleast_1d(index)[:, None]
    back = index - jnp.arange(own.key.shape[-2], dtype=jnp.int32)[None]
    mask = ((back >= 0) & (back < window))[:, None, None, None]
    prompt_mask = _prompt_mask(prompt, index, window)[:, :, 0, 0]
    mine = scores("bnkgd,bnksd->bnkgs", query, own, mask)
    rows = query.reshape(*together, size)
    shared = scores("bnrd,bnsd->bnrs", rows, prompt.keys, prompt_mask)
    # One softmax over both parts, without an array that holds them side by side.
    largest = jnp.maximum(mine.max(-1), shared.max(-1).reshape(apart))
    mine = jnp.exp(mine - largest[..., None])
    shared = jnp.exp(shared - largest.reshape(together)[..., None])
    total = mine.sum(-1) + shared.sum(-1).reshape(apart)
    mine = scaled(mine, own.value_scale).astype(query.dtype)
    shared = scaled(shared, prompt.keys.value_scale).astype(query.dtype)
    out = product("bnkgs,bnksd->bnkgd", mine, own.value)
    common = product("bnrs,bnsd->bnrd", shared, prompt.keys.value)
    out = (out + common.reshape(out.shape)) / total[..., None]
    return out.swapaxes(1, 2).reshape(batch, samples, heads, size).astype(query.dtype)


def _prompt_mask(
    prompt: Prompt, rows: Int[Array, "#B T"], window: Int[Array, ""]
) -> Bool[Array, "B 1 1 1 T P"]:
    columns = jnp.arange(prompt.keys.key.shape[-2], dtype=jnp.int32)
    lengths = prompt.lengths[:, None, None]
    back = lengths + rows[:, :, None] - columns[None, None, :]
    mask = (columns[None, None, :] < lengths) & (back < window)
    return mask[:, None, None, None]


def _joint(query, own, mask, prompt, prompt_mask, *, scale, softcap):
    """One softmax over the prompt's keys and the response's own: queries ``[B, K, N, G, T, D]``."""
    dtype = wide(query.dtype)
    query = query * jnp.asarray(scale, query.dtype)

    def scores(keys, equation, keep):
        raw = jnp.einsum(equation, query, keys, preferred_element_type=dtype)
        if softcap is not None:
            raw = softcap * jnp.tanh(raw / softcap)
        return jnp.where(keep, raw, jnp.finfo(dtype).min)

    # One softmax over both parts, without an array that holds them side by side; divided by its sum
    # after the values are, which spares a pass over the scores here and a reduction of them in the
    # derivative.
    parts = [scores(own.key, "bkngtd,bknsd->bkngts", mask)]
    if prompt is not None:
        parts.append(scores(prompt.keys.key, "bkngtd,bnsd->bkngts", prompt_mask))
    tops = [part.max(-1, keepdims=True) for part in parts]
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, tops))
    parts = [jnp.exp(part - largest) for part in parts]
    total = sum(part.sum(-1, keepdims=True) for part in parts)
    weights = [part.astype(query.dtype) for part in parts]
    out = jnp.einsum("bkngts,bknsd->bkngtd", weights[0], own.value)
    if prompt is not None:
        out += jnp.einsum("bkngts,bnsd->bkngtd", weights[1], prompt.keys.value)
    return (out.astype(dtype) / total).astype(query.dtype)
