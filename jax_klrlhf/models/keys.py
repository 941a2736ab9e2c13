"""Which keys of a Hugging Face ``config.json`` decide what a model computes, family by family.

A config that is read otherwise than transformers reads it is another model, silently. So every key
of a family's config class stands in one of three tables: :data:`HONOURED` (it decides what is
computed, and is read), :data:`REQUIRED` (it would, and only one value of it is computed here) or
:data:`IGNORED` (transformers computes the same logits whatever it is). A key that a newer
transformers adds stands in none, and is refused unless it has its default. Keys that a family's
class does not have (a ``sliding_window`` in a Llama's config) are ignored by transformers, and here
too, save for the few in :data:`REQUIRED` that it looks for in every config.

A test compares the tables with the classes, and with what torch computes.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax_klrlhf.errors import InputError

FAMILIES = ("gemma2", "gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` that are read and written; of ``gemma3`` the text part is read."""

_ALL = {"vocab_size", "initializer_range", "tie_word_embeddings"}
_LLAMA = _ALL | {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
}
_WINDOWS = {"sliding_window", "layer_types"}
_QWEN = _LLAMA | _WINDOWS | {"use_sliding_window", "max_window_layers"}
_GEMMA = (_LLAMA - {"hidden_act"}) | _WINDOWS
_GEMMA |= {"hidden_activation", "attention_bias", "query_pre_attn_scalar"}
_GEMMA |= {"final_logit_softcapping"}
HONOURED: Mapping[str, frozenset[str]] = {
    "llama": frozenset(_LLAMA | {"attention_bias", "mlp_bias"}),
    "mistral": frozenset(_LLAMA | {"sliding_window"}),
    "qwen2": frozenset(_QWEN),
    "qwen3": frozenset(_QWEN | {"attention_bias"}),
    "gemma2": frozenset(_GEMMA | {"attn_logit_softcapping"}),
    "gemma3_text": frozenset(_GEMMA),
    "gpt2": frozenset(
        _ALL
        | {
            "activation_function",
            "layer_norm_epsilon",
            "n_embd",
            "n_head",
            "n_inner",
            "n_layer",
            "n_positions",
        }
    ),
}
"""Read. Only these reach the readers in :mod:`~jax_klrlhf.models.config`."""

# The first of the values is the one that a message names.
_EVERYWHERE: Mapping[str, tuple[Any, ...]] = {
    "auto_map": (None,),
    "compression_config": (None,),
    "is_causal": (True,),
    "is_encoder_decoder": (False, None),
    "partial_rotary_factor": (1.0, None),
    "per_layer_config": (None,),
    "quantization_config": (None,),
    "transformers_weights": (None,),
}
_BOTH_WAYS = {"use_bidirectional_attention": (False, None)}
REQUIRED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(FAMILIES, _EVERYWHERE),
    "gemma2": {**_EVERYWHERE, **_BOTH_WAYS},
    "gemma3_text": {**_EVERYWHERE, **_BOTH_WAYS},
    "gpt2": {
        **_EVERYWHERE,
        "add_cross_attention": (False, None),
        "reorder_and_upcast_attn": (False, None),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "scale_attn_weights": (True,),
    },
}
"""Refused at any other value than these; transformers looks for most of them in every config."""

_COMMON = frozenset(
    {
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "transformers_version",
        "use_cache",
    }
)
_SUMMARY = ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")
IGNORED: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(FAMILIES, _COMMON),
    "llama": _COMMON | {"pretraining_tp"},
    # Read into an attribute that transformers' attention of Gemma 3 never uses.
    "gemma3_text": _COMMON | {"attn_logit_softcapping"},
    "gpt2": (_COMMON - {"attention_dropout"})
    | {"resid_pdrop", "embd_pdrop", "attn_pdrop"}
    | {f"summary_{name}" for name in _SUMMARY},
}
"""Without effect on logits in evaluation: dropout, ids of tokens, how outputs are packed."""

MOST = 2**31 - 1
"""Largest size that an array's axis can have here."""
MOST_LAYERS = 4096
"""Lists with an entry for each layer are made before any weight is looked for."""


def read(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The honoured keys of a config, with the family's defaults, and ``model_type``.

    Raises ``InputError`` naming ``where`` and the key of what is not computed here, or is no
    config at all.
    """
    family = settings.get("model_type")
    if family == "gemma3":  # With a vision tower, which is left out.
        inner = settings.get("text_config", {})
        if not isinstance(inner, Mapping):
            raise InputError(f"{where}: text_config is {_shown(inner)}, not an object of settings")
        _require("gemma3_text", settings, where)
        family = "gemma3_text"
        tied = settings.get("tie_word_embeddings", True)  # Of the whole, as in transformers.
        settings = {**inner, "model_type": family, "tie_word_embeddings": tied}
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"{where}: model_type={_shown(family)} is not supported; supported are "
            f"{', '.join(FAMILIES)}"
        )
    _require(family, settings, where)
    for key in ("num_hidden_layers", "n_layer"):
        layers = settings.get(key)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise InputError(f"{where}: {key}={_shown(layers)}; at most {MOST_LAYERS} are read")
    found = _class_of(family, settings, where)
    known = HONOURED[family] | IGNORED[family] | REQUIRED[family].keys()
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if field.name not in known and value != field.default:
            raise InputError(
                f"{where}: {field.name}={_shown(value)} is not known to this library; only "
                f"{_shown(field.default)} is"
            )
    facts = found.to_dict()
    # Qwen 2's class has no head_dim, but its attention looks for one.
    return {key: facts[key] for key in HONOURED[family] if key in facts} | {"model_type": family}


def whole(facts: Mapping[str, Any], key: str, where: str, *, least: int = 1) -> int:
    """A size: an integer of at least ``least``. ``InputError`` naming the key otherwise."""
    value = facts.get(key)
    if type(value) is not int or not least <= value <= MOST:
        raise InputError(
            f"{where}: {key}={_shown(value)}; it must be an integer of at least {least}"
        )
    return value


def real(facts: Mapping[str, Any], key: str, where: str, *, positive: bool = True) -> float:
    """A finite number, above 0 or at least 0. ``InputError`` naming the key otherwise."""
    value = facts.get(key)
    found = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # An integer of 400 digits fits no float.
            found = float(value)
    if not math.isfinite(found) or found < 0 or (positive and found == 0):
        bound = "above 0" if positive else "of at least 0"
        raise InputError(f"{where}: {key}={_shown(value)}; it must be a finite number {bound}")
    return found


def _require(family: str, settings: Mapping[str, Any], where: str) -> None:
    for key, right in REQUIRED[family].items():
        value = settings.get(key, right[0])
        if not any(value is r or (value == r and type(value) is not bool) for r in right):
            remedy = "remove the key if the weights are plain"
            if key == "auto_map":
                remedy = "code of a model's own is never run: remove the key if it has none"
            raise InputError(
                f"{where}: {key}={_shown(value)} is not supported, only {right[0]!r} is; {remedy}"
            )


def _class_of(family: str, settings: Mapping[str, Any], where: str) -> Any:
    """transformers' own reading of the settings, whose checks are many and one message long."""
    from transformers import AutoConfig  # Slow to import, and only names are wanted here.

    try:
        return AutoConfig.for_model(**{**copy.deepcopy(dict(settings)), "model_type": family})
    except Exception as error:  # Of a dozen classes, by what a wrong value runs into.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{where}: not a {family} config ({reason[-1].strip()[:300]})") from error


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # An integer of 5,000 digits; nested 100,000 deep.
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else text[:77] + "..."
