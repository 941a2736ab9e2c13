"""The network: embedding, one block scanned over layers, and the final norm.

Linen rather than NNX, decided by a measured probe (8 layers, per-layer constants, remat; jax 0.10
and 0.12, warnings as errors). Neither warned; trace and compile times were equal within noise
(0.5 s), init took 0.6-1.0 s in Linen and 1.6-1.9 s in NNX. What decided is the boundary:
everything outside this file is functions of ``(params, arrays)``, which is what ``Module.apply``
is, with parameters as nested dictionaries and LoRA as a second collection; NNX reaches the same
place through split, merge and a graph definition carried beside the parameters.

Facts that vary by layer (window, rotation) are arrays scanned with the parameters, so the program
holds one block however deep the model. How it attends is handed in (:mod:`.transformer`).

Axes: ``B`` prompts, ``K`` responses, ``T`` positions, ``E`` hidden size, ``H`` query heads, ``D``
head size, ``L`` layers.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jax_klrlhf.models import partition
from jax_klrlhf.models.attention import EVERYTHING, Keys
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
