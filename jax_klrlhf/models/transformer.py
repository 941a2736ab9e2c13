"""The decoder: one block, scanned over layers, behind the functions of a `LanguageModel`.

Linen rather than NNX, decided by a measured probe (8 layers, per-layer constants, remat; jax 0.10
and 0.12, warnings as errors). Neither warned; trace and compile times were equal within noise
(0.5 s), init took 0.6-1.0 s in Linen and 1.6-1.9 s in NNX. What decided is the boundary:
everything outside this file is functions of ``(params, arrays)``, which is what ``Module.apply``
is, with parameters as nested dictionaries and LoRA as a second collection; NNX reaches the same
place through split, merge and a graph definition carried beside the parameters.

Facts that vary by layer (window, rotation) are arrays scanned with the parameters, so the program
holds one block however deep the model. The three programs (reading a prompt, reading responses,
one decoding step) are this same block with another ``attend``.

Axes: ``B`` prompts, ``K`` responses, ``T`` positions (P of a prompt, C of a response), ``E`` hidden
size, ``H`` query heads, ``N`` key heads, ``D`` head size, ``V`` vocabulary, ``L`` layers.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import attention, chunked, in_place, packed, partition
from jax_klrlhf.models.attention import EVERYTHING, Keys, Prompt
from jax_klrlhf.models.base import LanguageModel, Prefix
from jax_klrlhf.models.config import ModelConfig, wide

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Layer(NamedTuple):
    """What varies from layer to layer, scanned: ``[L]`` outside the block, ``[]`` inside."""

    number: Int[Array, "*L"]
    window: Int[Array, "*L"]
    rope: Int[Array, "*L"]
    """Which of the rotation tables the layer uses."""


class _Cache(NamedTuple):
    """What decoding keeps."""

    own: Keys | list[Keys]
    """Of the responses: stacked, or one for each layer."""
    prompt: Keys | None
    """Of the prompts, in eight bits; None: they are the prefix's."""


class Norm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) or layer norm, over the last axis, in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
        """Normalized ``x``, in its dtype."""
        config = self.config
        y = x.astype(wide(config.dtype))
        offset = config.norm == "rms_offset"
        ones = nn.initializers.zeros if offset else nn.initializers.ones
        scale = self.param("scale", ones, x.shape[-1:], config.param_dtype).astype(y.dtype)
        if offset:
            scale = 1.0 + scale
        if config.norm == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + config.norm_eps)
        lead = (None,) * (x.ndim - 1)
        y = y * scale[lead]
        if config.norm == "layer":
            bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], config.param_dtype)
            y = y + bias[lead].astype(y.dtype)
        return y.astype(x.dtype)


class Projection(nn.Module):
    """Linear map of the last ``contract`` axes to ``features``, plus a low-rank update if given.

    The update ``lora_scale (x a) b`` (arXiv 2106.09685, eq. 3) is there when collection ``lora``
    holds ``a [in, rank]`` and ``b [rank, out]`` under this module's name. A kernel in eight bits
    has a ``kernel_scale`` beside it (:mod:`~jax_klrlhf.models.quantized`).
    """

    config: ModelConfig
    features: tuple[int, ...]
    contract: int = 1
    bias: bool = False
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """``x @ kernel + bias``."""
        config = self.config
        lead, inputs = x.shape[: -self.contract], x.shape[-self.contract :]
        init = nn.initializers.normal(config.init_scale)
        kernel = self.param("kernel", init, (*inputs, *self.features), config.param_dtype)
        axes = tuple(range(x.ndim - self.contract, x.ndim))
        dims = ((axes, tuple(range(self.contract))), ((), ()))
        path = f"layers/{self.name}/kernel"
        if self.has_variable("params", "kernel_scale"):
            kernel = partition.gathered(path, kernel).astype(config.dtype)
            out = jax.lax.dot_general(x, kernel, dims, preferred_element_type=wide(config.dtype))
            scale = self.get_variable("params", "kernel_scale").astype(out.dtype)
            out = (out * scale[(None,) * len(lead)]).astype(config.dtype)
        else:
            kernel = partition.gathered(path, kernel.astype(config.dtype))
            out = jax.lax.dot_general(x, kernel, dims)
        if self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", n).astype(config.dtype) for n in ("a", "b"))
            low = x.reshape(*lead, -1) @ a
            out += self.lora_scale * (low @ b).reshape(out.shape)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, config.param_dtype)
            out += bias[(None,) * len(lead)].astype(config.dtype)
        return out


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    config: ModelConfig
    attend: Callable[..., Any]
    constrain: Callable[[Array], Array]
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, carry: Any, layer: Layer, memory: Any, tables: Any, shared: Any) -> Any:
        """``((x, cache), kept)`` after one layer; ``x`` is ``[B, K, T, E]``."""
        config, (x, cache) = self.config, carry
        project = functools.partial(Projection, config, lora_scale=self.lora_scale)

        def norm(name):
            return Norm(config, name=name)

        hidden = norm("attention_norm")(x)
        query = project((config.heads, config.head_dim), bias=config.qkv_bias, name="query")(hidden)
        grouped = (config.kv_heads, config.head_dim)
        key = project(grouped, bias=config.qkv_bias, name="key")(hidden)
        value = project(grouped, bias=config.qkv_bias, name="value")(hidden)
        if config.qk_norm:
            query, key = norm("query_norm")(query), norm("key_norm")(key)
        if tables is not None:
            query, key = _rotate(query, tables, layer.rope), _rotate(key, tables, layer.rope)
        own = Keys(key.swapaxes(-3, -2), value.swapaxes(-3, -2))
        mixed, cache, kept = self.attend(query, own, layer, cache, memory, shared)
        out = project((config.hidden_size,), contract=2, bias=config.out_bias, name="out")(mixed)
        if config.post_norms:
            out = norm("attention_post_norm")(out)
        x = self.constrain(x + out)

        hidden = norm("mlp_norm")(x)
        activation = ACTIVATIONS[config.activation]
        inside = (config.intermediate_size,)
        inner = project(inside, bias=config.mlp_bias, name="up")(hidden)
        if config.gated:
            gate = project(inside, bias=config.mlp_bias, name="gate")(hidden)
            inner = activation(gate) * inner
        else:
            inner = activation(inner)
        out = project((config.hidden_size,), bias=config.mlp_bias, name="down")(inner)
        if config.post_norms:
            out = norm("mlp_post_norm")(out)
        return (self.constrain(x + out), cache), kept


class Decoder(nn.Module):
    """Embedding, the scanned blocks and the final norm, under one way of attending."""

    config: ModelConfig
    attend: Callable[..., Any]
    constrain: Callable[[Array], Array]
    lora_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "B K T"],
        positions: Int[Array, "B #K T"],
        cache: Any = None,
        memory: Any = None,
        shared: Any = None,
    ) -> Any:
        """``(hidden [B, K, T, E], cache, kept)``.

        ``cache`` is carried from layer to layer, ``memory`` is scanned over its first axis, and
        ``shared`` is the same for all; ``kept`` stacks what each layer returns. A cache that is a
        list, one for each layer, unrolls the layers.
        """
        config = self.config
        init = nn.initializers.normal(config.init_scale)
        table = self.param(
            "embedding", init, (config.vocab_size, config.hidden_size), config.param_dtype
        )
        x = partition.look_up(table, ids)
        if self.has_variable("params", "embedding_scale"):
            scale = self.get_variable("params", "embedding_scale").astype(wide(config.dtype))
            x = x.astype(scale.dtype) * scale[ids][..., None]
        x = x.astype(config.dtype)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, config.dtype)
        if config.learned_positions:
            shape = (config.max_length, config.hidden_size)
            x = x + self.param("positions", init, shape, config.param_dtype)[positions].astype(
                config.dtype
            )
        if not config.tied:
            # Made here so that `init` makes it; used by `unembed`.
            self.param(
                "unembedding", init, (config.hidden_size, config.vocab_size), config.param_dtype
            )
        layer, tables = _facts(config), _tables(config, positions)
        if isinstance(cache, list):
            stacked = {name: tree["layers"] for name, tree in self.variables.items()}
            block = Block(config, self.attend, self.constrain, self.lora_scale, parent=None)
            x, cache = _unrolled(
                block, stacked, (self.constrain(x), cache), layer, memory, tables, shared
            )
            return Norm(config, name="final_norm")(x), cache, None
        block = Block
        if config.remat is not None:
            block = nn.remat(Block, prevent_cse=False, policy=_policy(config.remat))
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (0, 0, nn.broadcast, nn.broadcast)),  # Its annotation says int.
            length=config.layers,
        )
        blocks = scanned(config, self.attend, self.constrain, self.lora_scale, name="layers")
        (x, cache), kept = blocks((self.constrain(x), cache), layer, memory, tables, shared)
        return Norm(config, name="final_norm")(x), cache, kept


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


def _unrolled(block, stacked, carry, layer, memory, tables, shared) -> Any:
    """The blocks one by one, from stacked weights and a list of caches: ``(x, caches)``."""
    x, caches = carry
    written = []
    # Traced and lowered once, whatever the number of layers.
    one = jax.jit(block.apply)
    for number, mine in enumerate(caches):
        variables, facts, read = jax.tree.map(operator.itemgetter(number), (stacked, layer, memory))
        (x, mine), _ = one(variables, (x, mine), facts, read, tables, shared)
        written.append(mine)
    return x, written


def _policy(remat: str | Callable[..., bool]) -> Callable[..., bool] | None:
    if remat == "full":
        return None
    return getattr(jax.checkpoint_policies, remat) if isinstance(remat, str) else remat


def _facts(config: ModelConfig) -> Layer:
    ropes = config.layer_ropes
    kinds = list(dict.fromkeys(ropes))
    return Layer(
        number=jnp.arange(config.layers, dtype=jnp.int32),
        window=jnp.array([EVERYTHING if w is None else w for w in config.layer_windows], jnp.int32),
        rope=jnp.array([kinds.index(r) for r in ropes] or [0] * config.layers, jnp.int32),
    )


def _tables(config: ModelConfig, positions: Int[Array, "B K T"]):
    """Cosines and sines ``[kinds, B, K, T, D/2]``, once for all layers; None without rotation."""
    if config.ropes is None:
        return None
    kinds = dict.fromkeys(config.layer_ropes)
    frequencies = jnp.stack(
        [jnp.asarray(r.frequencies(config.head_dim), wide(config.dtype)) for r in kinds]
    )
    angles = positions.astype(frequencies.dtype)[None, ..., None] * frequencies[:, None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Float[Array, "B K T H D"], tables: Any, kind: Int[Array, ""]) -> Array:
    cos, sin = (t[kind][..., None, :] for t in tables)
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
