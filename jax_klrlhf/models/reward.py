r"""Reward models: a linear head on the features of a response.

.. math:: r(x, y) = w^T \phi(x, y)

The features are a language model's hidden states, pooled over the response: the last token's (the
usual reward model) or the mean. The same features are what confidence sets and pessimism are
computed on. A margin is in nats of the Bradley-Terry logit.

An ensemble is a ``vmap``: of :func:`score` over stacked heads, ``in_axes=(0, None)``, or of
:func:`reward` over stacked models, ``in_axes=(None, 0, None, None)``.

On disk a reward model is what transformers calls sequence classification with one label.

Axes: ``B`` prompts, ``K`` responses to a prompt, ``C`` response positions, ``D`` hidden size.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jax_klrlhf import placement
from jax_klrlhf.core.numerics import at_least_float32
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import pretrained
from jax_klrlhf.models.base import LanguageModel, read
from jax_klrlhf.models.config import ModelConfig

CLASSIFIER = {
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
}
"""The class in transformers that a saved folder names."""
HEAD = "score.weight"


class RewardParams(NamedTuple):
    """Parameters of a reward model."""

    model: Any
    head: Float[Array, "*members D"]


class LoadedReward(NamedTuple):
    """What :func:`load` returns."""

    model: LanguageModel
    params: RewardParams
    tokenizer: Any
    config: ModelConfig


def last(
    prompt: Float[Array, "B D"], hidden: Float[Array, "B K C D"], mask: Bool[Array, "B K C"]
) -> Float[Array, "B K D"]:
    """The hidden state after the last token: the response's, or the prompt's if it is empty."""
    length = mask.sum(-1)
    index = jnp.maximum(length - 1, 0)[..., None, None]
    final = jnp.take_along_axis(hidden, index, axis=2)[:, :, 0]
    return jnp.where((length > 0)[..., None], final, prompt[:, None])


def mean(
    prompt: Float[Array, "B D"], hidden: Float[Array, "B K C D"], mask: Bool[Array, "B K C"]
) -> Float[Array, "B K D"]:
    """The mean hidden state over the response's tokens; the prompt's last where it is empty."""
    length = mask.sum(-1)[..., None]
    total = jnp.where(mask[..., None], hidden, 0.0).sum(2)
    average = total / jnp.maximum(length, 1).astype(total.dtype)
    return jnp.where(length > 0, average, prompt[:, None])


def features(
    model: LanguageModel,
    params: Any,
    prompts: Ragged,
    responses: Ragged,
    *,
    pooling: Callable[[Array, Array, Array], Array] = last,
) -> Float[Array, "B K D"]:
    """Pooled hidden states of each response, float32 at least; the prompt is read once.

    ``prompts`` are ``[B, P]``, ``responses`` ``[B, K, C]``; ``pooling`` is :func:`last`,
    :func:`mean`, or another function of (prompt's last state, hidden states, mask).
    """
    first, hidden = read(model, params, prompts, responses.ids)
    return pooling(at_least_float32(first), at_least_float32(hidden), responses.mask)


def init_head(key: Array, *, dim: int, scale: float | None = None) -> Float[Array, " D"]:
    """A random head: standard deviation ``scale``, ``1 / sqrt(dim)`` unless given."""
    return jax.random.normal(key, (dim,)) * (dim**-0.5 if scale is None else scale)


def score(head: Float[Array, " D"], features: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """Reward of each feature vector."""
    return jnp.einsum("...d,d->...", features, head.astype(features.dtype))


def reward(
    model: LanguageModel,
    params: RewardParams,
    prompts: Ragged,
    responses: Ragged,
    *,
    pooling: Callable[[Array, Array, Array], Array] = last,
) -> Float[Array, "B K"]:
    """Reward of each response, differentiable in model and head."""
    found = features(model, params.model, prompts, responses, pooling=pooling)
    return score(params.head, found)


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: RewardParams,
    tokenizer: Any = None,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write a folder that transformers loads for sequence classification with one label.

    transformers pools the last token that is not padding, so its reward is :func:`last`'s.

    Raises ``ValueError`` for the stacked heads of an ensemble: write its members one by one.
    """
    path = Path(path)
    head = placement.host(params.head)
    if head.ndim != 1:
        raise ValueError(
            f"head has shape {head.shape}; a folder holds one reward model, so write the members "
            "of an ensemble one by one"
        )
    bare = dataclasses.replace(config, tied=True)  # A classifier has no vocabulary projection.
    with pretrained.whole_folder(path) as partial:
        pretrained.write_weights(
            partial,
            bare,
            params.model,
            max_shard_bytes=max_shard_bytes,
            extra={HEAD: head[None]},
        )
        if placement.leader():
            settings = bare.to_hf() | {
                "architectures": [CLASSIFIER[config.family]],
                "id2label": {"0": "reward"},
                "label2id": {"reward": 0},
            }
            if tokenizer is not None:
                settings |= pretrained.token_ids(tokenizer, None)
                tokenizer.save_pretrained(str(partial))
            (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return path


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    mesh: Any = None,
    **overrides: Any,
) -> LoadedReward:
    """A reward model from a folder or hub id; arguments as :func:`pretrained.load`.

    Raises ``InputError`` naming the folder where there is no head with one label.
    """
    folder = pretrained.find(path)
    files = pretrained.Files(folder)
    if HEAD not in files.file_of:
        raise InputError(
            f"{folder}: tensor {HEAD} is missing, so this is no reward model; give a sequence "
            "classifier with one label, or start one with reward.init_head"
        )
    weight = files.tensor(HEAD)
    if weight.get_shape()[0] != 1:
        raise InputError(
            f"{folder}: {HEAD} has shape {weight.get_shape()}; a reward model has one label"
        )
    loaded = pretrained.read(
        folder,
        dtype=dtype,
        param_dtype=param_dtype,
        mesh=mesh,
        heads=(HEAD,),
        tied=True,
        **overrides,
    )
    head = jnp.asarray(weight[:][0], loaded.config.param_dtype)
    if head.shape != (loaded.config.hidden_size,) or not jnp.isfinite(head).all():
        raise InputError(
            f"{folder}: {HEAD} has shape {weight.get_shape()} or numbers that are not finite; the "
            f"config asks for [1, {loaded.config.hidden_size}]"
        )
    params = RewardParams(model=loaded.params, head=head)
    return LoadedReward(loaded.model, params, loaded.tokenizer, loaded.config)
