"""A decoder read in every way that training and sampling need: the functions of a `LanguageModel`.

Reading prompts, reading responses after them, both as one row of tokens, packed streams and one
decoding step are all the network of :mod:`.decoder` with another ``attend``.

Axes: ``B`` prompts, ``K`` responses, ``T`` positions (P of a prompt, C of a response), ``E`` hidden
size, ``H`` query heads, ``N`` key heads, ``D`` head size, ``V`` vocabulary, ``L`` layers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import attention, chunked, in_place, packed, partition
from jax_klrlhf.models.attention import Keys, Prompt
from jax_klrlhf.models.base import LanguageModel, Prefix
from jax_klrlhf.models.config import ModelConfig, wide
from jax_klrlhf.models.decoder import Decoder


class _Cache(NamedTuple):
    """What decoding keeps."""

    own: Keys | list[Keys]
    """Of the responses: stacked, or one for each layer."""
    prompt: Keys | None
    """Of the prompts, in eight bits; None: they are the prefix's."""


@functools.cache
def language_model(
    config: ModelConfig,
    *,
    constrain: Callable[[Array], Array] = partition.constrain,
    lora_scale: float | None = None,
) -> LanguageModel:
    """The decoder as nine pure functions of ``(params, arrays)``.

    ``constrain`` is applied to the activations ``[B, K, T, E]`` after every residual sum. With
    ``lora_scale`` the parameters are ``{"base": ..., "lora": ...}``, low-rank updates are added
    with that factor, and no gradient reaches the base (see :mod:`~jax_klrlhf.models.lora`). Equal
    arguments return the same object, so a jitted caller traces once.
    """
    settings: dict[str, Any] = {
        "scale": config.scale,
        "softcap": config.attention_softcap,
    }
    kinds = tuple(dict.fromkeys(config.layer_windows))

    def run(params, attend, *args) -> Any:
        if lora_scale is None:
            return Decoder(config, attend, constrain).apply({"params": params}, *args)
        variables = {"params": base(params), "lora": params["lora"]}
        return Decoder(config, attend, constrain, lora_scale).apply(variables, *args)

    def base(params):
        return params if lora_scale is None else jax.lax.stop_gradient(params["base"])

    def read(query, own, layer, cache, memory, shared):
        """Whole rows: a prompt by itself, or responses after their prompt (``memory``)."""
        prompt = None if memory is None else Prompt(memory, shared)
        implementation = config.attention or functools.partial(
            attention.by_platform, platform=config.platform
        )
        out = implementation(query, own, prompt, window=layer.window, windows=kinds, **settings)
        kept = jax.tree.map(lambda x: x[:, 0], own) if memory is None else None
        return out, cache, kept

    def advance(query, own, layer, cache, memory, shared):
        """One token of every response: written into the cache, then attended from it."""
        lengths, index, prompts = shared
        own = jax.tree.map(lambda x: x.swapaxes(1, 2), own)  # [B, N, K, 1, D]
        if config.kv == "int8":
            own = attention.eight(own)
        if cache.key.ndim == own.key.ndim:
            cache = attention.written(cache, own, index)
            mine = cache
        else:
            # The whole cache is carried and one token of it written: a scanned-out cache would be
            # copied at every step.
            cache = attention.written(cache, own, index, layer.number)
            if prompts is not None:
                asked = Prompt(prompts, lengths)
                out = in_place.step(
                    query[:, :, 0], cache, asked, index, layer.number, window=layer.window,
                    **settings,
                )  # fmt: skip
                return out[:, :, None], cache, None
            mine = jax.tree.map(
                lambda whole: jax.lax.dynamic_index_in_dim(whole, layer.number, keepdims=False),
                cache,
            )
        prompt = Prompt(memory, lengths)
        out = attention.step(query[:, :, 0], mine, prompt, index, window=layer.window, **settings)
        return out[:, :, None], cache, None

    def pack(params, streams: packed.Packed) -> Float[Array, "R T E"]:
        def attend(query, own, layer, cache, memory, way):
            """Laid out as rectangles for attention, prompts first and then what follows them."""
            query, key, value = (
                packed.rectangles(streams, packed.take(x[:, 0], way))
                for x in (query, own.key.swapaxes(-3, -2), own.value.swapaxes(-3, -2))
            )
            mixed = []
            for queries, keys, values, prompts in zip(
                query, key, value, streams.prompts, strict=True
            ):
                prompt, mine = (
                    Keys(k.swapaxes(-3, -2), v.swapaxes(-3, -2))
                    for k, v in zip(keys, values, strict=True)
                )
                alone = jax.tree.map(lambda x: x[:, None], prompt)
                first, _, _ = read(queries[0][:, None], alone, layer, None, None, None)
                then, _, _ = read(queries[1], mine, layer, None, prompt, prompts.lengths)
                rows = (way.forward.shape[0], -1, *first.shape[-2:])
                mixed += [first.reshape(rows), then.reshape(rows)]
            out = packed.take(jnp.concatenate(mixed, axis=1), way.inverse)
            return out[:, None], cache, None

        ids, positions = packed.tokens(streams)
        way = packed.route(streams)
        hidden, _, _ = run(params, attend, ids[:, None], positions[:, None], None, None, way)
        return hidden[:, 0]

    def init(key):
        ids = jnp.zeros((1, 1, 1), jnp.int32)
        return Decoder(config, read, lambda x: x).init(key, ids, ids)["params"]

    def prefill(params, prompts: Ragged) -> Prefix:
        if config.prefill_chunk is not None and config.prefill_chunk < prompts.ids.shape[-1]:
            return in_chunks(params, prompts, config.prefill_chunk)
        positions = jnp.arange(prompts.ids.shape[-1], dtype=jnp.int32)[None, None]
        positions = jnp.broadcast_to(positions, (prompts.ids.shape[0], 1, prompts.ids.shape[1]))
        hidden, _, cache = run(params, read, prompts.ids[:, None], positions)
        last = jnp.maximum(prompts.lengths - 1, 0)[:, None, None]
        hidden = jnp.take_along_axis(hidden[:, 0], last, axis=1)[:, 0]
        return Prefix(hidden=hidden, cache=cache, lengths=prompts.lengths.astype(jnp.int32))

    def in_chunks(params, prompts: Ragged, chunk: int) -> Prefix:
        def attend(query, own, layer, cache, memory, before):
            out, _, _ = read(query, own, layer, None, memory, before)
            return out, cache, jax.tree.map(lambda x: x[:, 0], own)

        def piece(ids, positions, keys, before):
            hidden, _, new = run(
                params, attend, ids[:, None], positions[:, None], None, keys, before
            )
            return hidden[:, 0], new

        def room(size):
            rows = prompts.ids.shape[0]
            shape = (config.layers, rows, config.kv_heads, size, config.head_dim)
            keys = jnp.zeros(shape, config.dtype)
            return Keys(keys, keys), jnp.zeros((rows, config.hidden_size), config.dtype)

        return chunked.prefill(piece, prompts, chunk=chunk, room=room)

    def extend(params, prefix: Prefix, ids: Int[Array, "B K C"]) -> Float[Array, "B K C E"]:
        steps = jnp.arange(ids.shape[-1], dtype=prefix.lengths.dtype)
        positions = prefix.lengths[:, None, None] + steps[None, None]
        hidden, _, _ = run(params, read, ids, positions, None, prefix.cache, prefix.lengths)
        return hidden

    def together(params, prompts: Ragged, ids: Int[Array, "B K C"]):
        """Every layer takes prompts and responses as one row of tokens; attention alone tells them
        apart."""
        (rows, width), (_, samples, length) = prompts.ids.shape, ids.shape
        lengths = prompts.lengths.astype(jnp.int32)

        def attend(query, own, layer, cache, memory, shared):
            def apart(x, axis):
                first, then = jnp.split(x, [width], axis=axis)
                cut = (*then.shape[:axis], samples, length, *then.shape[axis + 1 :])
                # [B, 1, ..., K, C, ...] to [B, K, ..., C, ...]
                return first, jnp.moveaxis(then.reshape(cut), axis, 1)[:, :, 0]

            queries = apart(query, 2)
            (prompt, mine) = (
                Keys(*both) for both in zip(apart(own.key, 3), apart(own.value, 3), strict=True)
            )
            first, _, _ = read(queries[0], prompt, layer, None, None, None)
            alone = jax.tree.map(lambda x: x[:, 0], prompt)
            then, _, _ = read(queries[1], mine, layer, None, alone, lengths)
            then = then.reshape(rows, 1, samples * length, *then.shape[3:])
            return jnp.concatenate([first, then], axis=2), cache, None

        place = jnp.arange(width, dtype=jnp.int32)
        after = lengths[:, None, None] + jnp.arange(length, dtype=jnp.int32)[None, None]
        after = jnp.broadcast_to(after, ids.shape).reshape(rows, -1)
        positions = jnp.concatenate([jnp.broadcast_to(place, (rows, width)), after], axis=1)
        tokens = jnp.concatenate([prompts.ids, ids.reshape(rows, -1)], axis=1)
        hidden, _, _ = run(params, attend, tokens[:, None], positions[:, None])
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        prompt = jnp.take_along_axis(hidden[:, 0, :width], last, axis=1)[:, 0]
        return prompt, hidden[:, 0, width:].reshape(*ids.shape, -1)

    def start(params, prefix: Prefix, samples: int, max_new_tokens: int) -> _Cache:
        del params
        rows = prefix.lengths.shape[0]
        shape = (rows, config.kv_heads, samples, max_new_tokens, config.head_dim)
        prompt = attention.eight(prefix.cache) if config.kv == "int8" else None
        if platform() == "cpu":
            # XLA's CPU compiler copies a layer out of a stacked cache, and a layer's prompt out of
            # the stacked prompts, at every step. Layers unrolled over arrays of their own read in
            # place; elsewhere the scan keeps the program small.
            return _Cache([empty(shape) for _ in range(config.layers)], prompt)
        return _Cache(empty((config.layers, *shape)), prompt)

    def platform():
        return config.platform or jax.default_backend()

    def empty(shape):
        zeros = jnp.zeros(shape, config.dtype)
        return attention.eight(Keys(zeros, zeros)) if config.kv == "int8" else Keys(zeros, zeros)

    def grow(cache: _Cache, max_new_tokens: int) -> _Cache:
        is_keys = lambda x: isinstance(x, Keys)  # noqa: E731
        longer = functools.partial(attention.longer, room=max_new_tokens)
        return cache._replace(own=jax.tree.map(longer, cache.own, is_leaf=is_keys))

    def decode(
        params, prefix: Prefix, cache: _Cache, ids: Int[Array, "B K"], step: Int[Array, "*B"]
    ):
        step = jnp.asarray(step, prefix.lengths.dtype)
        positions = (prefix.lengths + step)[:, None, None]
        memory, stack = prefix.cache if cache.prompt is None else cache.prompt, None
        if not isinstance(cache.own, list) and platform() == "tpu" and in_place.fits(config, ids):
            memory, stack = None, memory
        shared = prefix.lengths, step, stack
        hidden, own, _ = run(params, advance, ids[..., None], positions, cache.own, memory, shared)
        return hidden[:, :, 0], cache._replace(own=own)

    def unembed(params, hidden: Float[Array, "*batch E"]) -> Float[Array, "*batch V"]:
        params = base(params)
        name, axis = ("embedding", 1) if config.tied else ("unembedding", 0)
        logits = partition.project(
            hidden, params[name].astype(hidden.dtype), axis=axis, dtype=wide(config.dtype)
        )
        if f"{name}_scale" in params:
            scale = params[f"{name}_scale"].astype(logits.dtype)
            logits *= scale[(None,) * (logits.ndim - 1)]
        if config.final_softcap is not None:
            logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
        return logits

    return LanguageModel(
        vocab_size=config.vocab_size,
        max_length=config.max_length,
        init=init,
        prefill=prefill,
        extend=extend,
        together=together,
        start=start,
        grow=grow,
        decode=decode,
        unembed=unembed,
        pack=pack,
    )
