"""What shape a decoder has: one static record, read from and written to Hugging Face configs.

One decoder covers every family here, because they differ in facts, not in structure: which norm,
which biases, how far a layer looks back (``windows``), how it turns its positions (``ropes``).
:meth:`ModelConfig.from_hf` maps a ``config.json`` to those facts and refuses, naming the key, what
the decoder does not compute; :meth:`ModelConfig.to_hf` is its inverse.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_klrlhf.errors import InputError
from jax_klrlhf.models import keys

GEMMAS = ("gemma2", "gemma3_text")
SLIDING, FULL = "sliding_attention", "full_attention"
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def wide(dtype: Any) -> Any:
    """The dtype of norms, softmaxes and logits: float32, or float64 where activations are that."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding of one layer (arXiv 2104.09864, eq. 34; half-split convention)."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    """Context extension: ``linear`` divides every frequency by it, ``llama3`` the low ones only."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position, ``[head_dim / 2]``, in float64 (host)."""
        frequency = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            return frequency / self.factor
        if self.kind == "llama3":
            # Waves that fit the original context at least `high_freq_factor` times are kept, those
            # that fit fewer than `low_freq_factor` times are slowed, with a ramp between.
            turns = self.original_max_length * frequency / (2 * math.pi)
            ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = np.clip(ramp, 0.0, 1.0)
            return frequency * (keep + (1 - keep) / self.factor)
        return frequency


@jax.tree_util.register_static
@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Static facts of a decoder. The defaults are a plain Llama; equal configs share one trace."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_length: int
    """Longest prompt plus response, in tokens."""
    family: str = "llama"
    """Hugging Face ``model_type``: how weights are named on disk. The decoder never reads it."""
    norm: Literal["rms", "rms_offset", "layer"] = "rms"
    """``rms_offset`` multiplies by ``1 + scale`` (Gemma)."""
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    """A second norm after attention and after the feed-forward, before the residual sum."""
    learned_positions: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None
    """What scores are multiplied by; None is ``head_dim ** -0.5``."""
    attention_softcap: float | None = None
    final_softcap: float | None = None
    tied: bool = True
    windows: tuple[int | None, ...] | None = None
    """Per layer, how many positions back (itself included) it sees; None: all."""
    ropes: tuple[Rope, ...] | None = (Rope(),)
    """Per layer, or one for all layers; None: positions are not rotated."""
    dtype: Any = jnp.float32
    """Of activations. Norms, softmaxes and logits are float32 whatever it is."""
    param_dtype: Any = jnp.float32
    remat: str | Callable[..., bool] | None = None
    """What the backward pass recomputes, layer by layer: None nothing, ``"full"`` everything, else
    a policy or its name in ``jax.checkpoint_policies``."""
    attention: Callable[..., jax.Array] | None = None
    """One of :mod:`~jax_klrlhf.models.attention`'s implementations; None: by platform."""
    kv: Literal["float", "int8"] = "float"
    """Of the keys and values that decoding keeps: as activations are, or eight bits with a scale
    for each head and position (:mod:`~jax_klrlhf.models.quantized`)."""
    prefill_chunk: int | None = None
    """Tokens of a prompt that are read at one time before sampling; None: all. What a layer makes
    besides keys and values then exists for a piece at a time, for about twice the attention of
    reading the whole in causal blocks."""
    platform: str | None = None
    """What it will run on (``cpu``, ``gpu``, ``tpu``), where that is not what it is traced on: a
    program compiled ahead of time. None: JAX's default backend."""
    init_scale: float = 0.02

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}: each key head "
                "serves a group of query heads"
            )
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk={self.prefill_chunk}: must be at least 1, or None")
        for name in ("windows", "ropes"):
            per_layer = getattr(self, name)
            if per_layer is not None and len(per_layer) not in (1, self.layers):
                raise ValueError(
                    f"{name} has {len(per_layer)} entries for layers={self.layers}: give one per "
                    "layer, or one for all"
                )
        named = isinstance(self.remat, str) and self.remat != "full"
        if named and not hasattr(jax.checkpoint_policies, str(self.remat)):
            raise ValueError(
                f"remat={self.remat!r} names no policy: give None, 'full', or a name in "
                "jax.checkpoint_policies such as 'dots_with_no_batch_dims_saveable'"
            )

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of every layer; one that reaches over ``max_length`` counts as None."""
        windows = self.windows or (None,)
        windows = tuple(None if w is None or w >= self.max_length else w for w in windows)
        return windows * self.layers if len(windows) == 1 else windows

    @property
    def layer_ropes(self) -> tuple[Rope, ...]:
        """The rotation of every layer; empty without rotation."""
        if self.ropes is None:
            return ()
        return self.ropes * self.layers if len(self.ropes) == 1 else self.ropes

    @classmethod
    def from_hf(
        cls, settings: Mapping[str, Any], *, where: str = "config.json", **overrides: Any
    ) -> "ModelConfig":
        """The facts in a Hugging Face config (``rope_parameters``, or ``rope_theta`` as of old).

        Which keys are read is told in :mod:`~jax_klrlhf.models.keys`; those that are left out have
        the family's own defaults. ``overrides`` set fields of this class.

        Raises ``InputError`` naming ``where`` and the key of whatever is not computed here.
        """
        facts = keys.read(settings, where)
        family = facts["model_type"]
        reader = _gpt2 if family == "gpt2" else _llama_like
        try:
            return cls(**{"family": family, **reader(facts, where), **overrides})
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` whose :meth:`from_hf` is this config, for transformers of any age."""
        from transformers import AutoConfig

        write = _to_gpt2 if self.family == "gpt2" else _to_llama_like
        honoured = keys.HONOURED[self.family]
        written = {key: value for key, value in write(self).items() if key in honoured}
        settings = AutoConfig.for_model(self.family, **written).to_dict()
        settings.update(dtype=str(self.param_dtype), torch_dtype=str(self.param_dtype))
        settings.update(_old_rope(settings.get("rope_parameters")))
        again = ModelConfig.from_hf(settings)
        lost = [
            field.name
            for field in fields(self)
            if field.name not in RUNTIME and _value(self, field.name) != _value(again, field.name)
        ]
        if lost:
            raise ValueError(
                f"family {self.family!r} cannot write {lost[0]}={getattr(self, lost[0])!r}: its "
                f"config.json would mean {getattr(again, lost[0])!r}"
            )
        return settings


RUNTIME = ("dtype", "param_dtype", "remat", "attention", "kv", "prefill_chunk", "platform")
"""How to compute, not what: fields that no file holds."""


def _value(config: ModelConfig, name: str) -> Any:
    """A field in its one form: what is written once for all layers, once for each."""
    alike = {
        "windows": config.layer_windows,
        "ropes": config.layer_ropes,
        "query_scale": round(config.scale, 12),
    }
    return alike.get(name, getattr(config, name))


def _activation(hf: Mapping[str, Any], key: str, where: str) -> str:
    if hf[key] not in ACTIVATIONS:
        raise InputError(
            f"{where}: {key}={hf[key]!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[hf[key]]


def _llama_like(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Everything but GPT-2 is a Llama with a few facts changed."""
    family = hf["model_type"]
    gemma = family in GEMMAS
    layers = keys.whole(hf, "num_hidden_layers", where)
    heads = keys.whole(hf, "num_attention_heads", where)
    hidden, longest = (
        keys.whole(hf, key, where) for key in ("hidden_size", "max_position_embeddings")
    )
    kinds = _kinds(hf, layers, where)
    ropes = _ropes(hf, kinds, longest, where)
    head_dim = hidden // heads
    if hf.get("head_dim") is not None:
        head_dim = keys.whole(hf, "head_dim", where)
    if head_dim < 2 or head_dim % 2:
        raise InputError(
            f"{where}: head_dim={head_dim}; positions are rotated in pairs, so it must be even"
        )
    biased = bool(hf.get("attention_bias"))
    facts: dict[str, Any] = {
        "vocab_size": keys.whole(hf, "vocab_size", where),
        "hidden_size": hidden,
        "intermediate_size": keys.whole(hf, "intermediate_size", where),
        "layers": layers,
        "heads": heads,
        "kv_heads": keys.whole(hf, "num_key_value_heads", where),
        "head_dim": head_dim,
        "max_length": longest,
        "norm": "rms_offset" if gemma else "rms",
        "norm_eps": keys.real(hf, "rms_norm_eps", where, positive=False),
        "activation": _activation(hf, "hidden_activation" if gemma else "hidden_act", where),
        "qkv_bias": biased or family == "qwen2",
        "out_bias": biased,
        "mlp_bias": bool(hf.get("mlp_bias")),
        "qk_norm": family in ("qwen3", "gemma3_text"),
        "post_norms": gemma,
        "tied": bool(hf["tie_word_embeddings"]),
        "windows": tuple(hf["sliding_window"] if k == SLIDING else None for k in kinds),
        "ropes": ropes,
        "init_scale": keys.real(hf, "initializer_range", where, positive=False),
    }
    if gemma:
        facts |= {
            "embedding_scale": hidden**0.5,
            "query_scale": keys.real(hf, "query_pre_attn_scalar", where) ** -0.5,
            "attention_softcap": _softcap(hf, "attn_logit_softcapping", where),
            "final_softcap": _softcap(hf, "final_logit_softcapping", where),
        }
    return facts


def _kinds(hf: Mapping[str, Any], layers: int, where: str) -> list[str]:
    """``sliding_attention`` or ``full_attention`` of every layer."""
    window = hf.get("sliding_window")
    # Mistral's window is every layer's; Llama has none, whatever its config says.
    kinds = hf.get("layer_types") or [FULL if window is None else SLIDING] * layers
    unknown = {str(kind) for kind in kinds} - {SLIDING, FULL}
    if unknown:
        raise InputError(f"{where}: layer_types has {sorted(unknown)[0]!r}, which is not supported")
    if len(kinds) != layers:
        raise InputError(f"{where}: layer_types has {len(kinds)} entries for {layers} layers")
    if SLIDING in kinds:
        keys.whole(hf, "sliding_window", where)
    return kinds


def _softcap(hf: Mapping[str, Any], key: str, where: str) -> float | None:
    return None if hf.get(key) is None else keys.real(hf, key, where)


def _to_llama_like(config: ModelConfig) -> dict[str, Any]:
    gemma = config.family in GEMMAS
    windows = config.windows or (None,)
    windows = windows * config.layers if len(windows) == 1 else windows
    kinds = ["full_attention" if w is None else "sliding_attention" for w in windows]
    widths = {w for w in windows if w is not None}
    by_kind = dict(zip(kinds, config.layer_ropes, strict=True))
    if len(widths) > 1 or any(
        by_kind[k] != r for k, r in zip(kinds, config.layer_ropes, strict=True)
    ):
        raise ValueError(
            f"family {config.family!r} writes one window and one rotation per kind of layer, not "
            f"windows={sorted(widths)} with {len(set(config.layer_ropes))} rotations"
        )
    window = next(iter(widths), None)
    activation = {v: k for k, v in reversed(ACTIVATIONS.items())}[config.activation]
    if config.activation == "gelu_tanh":
        activation = "gelu_pytorch_tanh"
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "hidden_activation" if gemma else "hidden_act": activation,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_scale,
        "sliding_window": window,
    }
    if config.family in ("llama", "qwen3", *GEMMAS):
        settings["attention_bias"] = config.out_bias
    if config.family == "llama":
        settings["mlp_bias"] = config.mlp_bias
    if config.family in ("qwen2", "qwen3", *GEMMAS):
        settings["layer_types"] = kinds
        settings["use_sliding_window"] = window is not None
    if gemma:
        settings["query_pre_attn_scalar"] = round(config.scale**-2)
        settings["attn_logit_softcapping"] = config.attention_softcap
        settings["final_logit_softcapping"] = config.final_softcap
    if config.family == "gemma3_text":
        ropes = {kind: _from_rope(rope) for kind, rope in by_kind.items()}
        settings["rope_parameters"] = ropes
    else:
        settings["rope_parameters"] = _from_rope(config.layer_ropes[0])
    return settings


def _gpt2(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    width, heads = (keys.whole(hf, key, where) for key in ("n_embd", "n_head"))
    if width % heads:
        raise InputError(f"{where}: n_embd={width} is not a multiple of n_head={heads}")
    inner = 4 * width if hf["n_inner"] is None else keys.whole(hf, "n_inner", where)
    return {
        "vocab_size": keys.whole(hf, "vocab_size", where),
        "hidden_size": width,
        "intermediate_size": inner,
        "layers": keys.whole(hf, "n_layer", where),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": width // heads,
        "max_length": keys.whole(hf, "n_positions", where),
        "norm": "layer",
        "norm_eps": keys.real(hf, "layer_norm_epsilon", where, positive=False),
        "activation": _activation(hf, "activation_function", where),
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "learned_positions": True,
        "tied": bool(hf["tie_word_embeddings"]),
        "ropes": None,
        "init_scale": keys.real(hf, "initializer_range", where, positive=False),
    }


def _to_gpt2(config: ModelConfig) -> dict[str, Any]:
    names = {"gelu_tanh": "gelu_new", "silu": "silu", "gelu": "gelu", "relu": "relu"}
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": names[config.activation],
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_scale,
    }


def _ropes(
    hf: Mapping[str, Any], kinds: list[str], max_length: int, where: str
) -> tuple[Rope, ...]:
    parameters = hf["rope_parameters"]
    by_kind = hf["model_type"] == "gemma3_text"
    if not by_kind and {SLIDING, FULL} & set(parameters):
        raise InputError(
            f"{where}: rope_parameters by kind of layer are not supported for model_type="
            f"{hf['model_type']!r}; give one rotation"
        )
    ropes = {}
    for kind in dict.fromkeys(kinds):
        mine = parameters.get(kind) if by_kind else parameters
        if not isinstance(mine, Mapping):
            raise InputError(f"{where}: rope_parameters has no rotation for {kind}")
        ropes[kind] = _to_rope(mine, max_length, where)
    return tuple(ropes[kind] for kind in kinds)


def _to_rope(parameters: Mapping[str, Any], max_length: int, where: str) -> Rope:
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise InputError(
            f"{where}: rope_type={kind!r} is not supported; supported are default, linear, llama3"
        )
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise InputError(f"{where}: partial_rotary_factor is not supported in rope_parameters")
    theta = keys.real(parameters, "rope_theta", where)
    if kind == "default":
        return Rope(theta=theta)
    factor = keys.real(parameters, "factor", where)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=factor)
    low, high = (keys.real(parameters, f"{end}_freq_factor", where) for end in ("low", "high"))
    if high <= low:
        raise InputError(
            f"{where}: high_freq_factor={high:g} must be above low_freq_factor={low:g}"
        )
    original = max_length
    if parameters.get("original_max_position_embeddings") is not None:
        original = keys.whole(parameters, "original_max_position_embeddings", where)
    return Rope(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_length=original,
    )


def _from_rope(rope: Rope) -> dict[str, Any]:
    settings: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        settings["factor"] = rope.factor
    if rope.kind == "llama3":
        settings |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_length,
        }
    return settings


def _old_rope(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The same rotation under the keys that transformers 4 reads."""
    if parameters is None:
        return {}
    nested = parameters.get("full_attention") or parameters.get("sliding_attention")
    whole = nested or parameters
    old: dict[str, Any] = {"rope_theta": whole["rope_theta"]}
    if nested and parameters.get("sliding_attention"):
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    if whole["rope_type"] != "default":
        old["rope_scaling"] = {k: v for k, v in whole.items() if k != "rope_theta"}
    return old
