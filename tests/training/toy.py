"""A language model as a plain pytree: each token attends equally to all before it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models.base import LanguageModel, Prefix
from jax_klrlhf.models.batch import Batch
from jax_klrlhf.placement import BATCH

VOCAB = 16


def _init(dim, key):
    embed, mix, skip, out = jax.random.split(key, 4)
    return {
        "embed": {"table": 0.5 * jax.random.normal(embed, (VOCAB, dim))},
        "block": {
            "mix": jax.random.normal(mix, (dim, dim)) / dim**0.5,
            "skip": jax.random.normal(skip, (dim, dim)) / dim**0.5,
        },
        "head": {"out": jax.random.normal(out, (dim, VOCAB)) / dim**0.5},
    }


def _constrain(x):
    """Rows over the mesh, as a real model constrains its activations."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def _hidden(params, total, count, last):
    mean = total / count[..., None].astype(total.dtype)
    block = params["block"]
    return _constrain(jnp.tanh(mean @ block["mix"] + last @ block["skip"]))


def _prefill(params, prompts):
    vectors = params["embed"]["table"][prompts.ids]
    keep = jnp.arange(prompts.ids.shape[-1])[None] < prompts.lengths[:, None]
    total = jnp.where(keep[..., None], vectors, jnp.zeros_like(vectors)).sum(1)
    last = jnp.take_along_axis(vectors, prompts.lengths[:, None, None] - 1, 1)[:, 0]
    return Prefix(_hidden(params, total, prompts.lengths, last), total, prompts.lengths)


def _extend(params, prefix, ids):
    vectors = params["embed"]["table"][ids]
    total = prefix.cache[:, None, None] + jnp.cumsum(vectors, 2)
    count = prefix.lengths[:, None, None] + 1 + jnp.arange(ids.shape[-1])[None, None]
    return _hidden(params, total, jnp.broadcast_to(count, ids.shape), vectors)


def _start(params, prefix, samples, max_new_tokens):
    shape = (prefix.cache.shape[0], samples, prefix.cache.shape[1])
    return jnp.broadcast_to(prefix.cache[:, None], shape)


def _decode(params, prefix, cache, ids, step):
    vectors = params["embed"]["table"][ids]
    total = cache + vectors
    count = jnp.broadcast_to(prefix.lengths[:, None] + 1 + step, ids.shape)
    return _hidden(params, total, count, vectors), total


def _unembed(params, hidden):
    return (hidden @ params["head"]["out"].astype(hidden.dtype)).astype(jnp.float32)


def language_model(dim: int = 8) -> LanguageModel:
    return LanguageModel(
        vocab_size=VOCAB,
        max_length=64,
        init=partial(_init, dim),
        prefill=_prefill,
        extend=_extend,
        start=_start,
        decode=_decode,
        unembed=_unembed,
    )


def batch(seed: int, rows: int = 16, responses: int = 2, prompt: int = 6, response: int = 5):
    """Random ragged rows with unequal weights, one of them zero."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 2.0, rows).astype(np.float32)
    weights[-1] = 0.0
    lengths = rng.integers(1, response + 1, (rows, responses)).astype(np.int32)
    lengths[-1] = 0
    return Batch(
        prompts=Ragged(
            rng.integers(0, VOCAB, (rows, prompt)).astype(np.int32),
            rng.integers(1, prompt + 1, rows).astype(np.int32),
        ),
        responses=Ragged(
            rng.integers(0, VOCAB, (rows, responses, response)).astype(np.int32), lengths
        ),
        weight=weights,
        ref_log_prob=-rng.uniform(5.0, 15.0, (rows, responses)).astype(np.float32),
    )
