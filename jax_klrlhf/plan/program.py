"""The real programs, from shapes alone: nothing here makes an array of a model's size.

The training step and the sampler are the library's own (:mod:`training.step`,
:mod:`models.sampling`). States and batches are ``ShapeDtypeStruct`` with the shardings that a run
would have, so what is compiled is what a run compiles.

Axes: ``B`` prompts, ``K`` responses to a prompt, ``P`` prompt and ``C`` response positions.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_klrlhf.core import objectives
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import lora, partition, quantized, sampling, scoring
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.batch import Batch
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.logits import Warp
from jax_klrlhf.models.transformer import language_model
from jax_klrlhf.plan.chips import Slice
from jax_klrlhf.training import make_train_step, reference
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training import state as states


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Size of a batch: ``pairs`` prompts, ``responses`` to each, and their padded lengths."""

    prompts: int
    responses: int
    prompt: int
    response: int


class Flops(NamedTuple):
    """Of one forward pass over all devices."""

    linear: float
    """Kernels and the vocabulary projection."""
    attention: float
    """Scores and mixtures, of pairs that a causal window lets through."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program that can be lowered, and what is known of it beforehand."""

    name: str
    lower: Callable[[], Any]
    arguments: dict[str, Any]
    """Abstract arguments by kind: parameters, optimizer, batch, ..."""
    useful_flops: float
    """Of the mathematics over all devices: no recomputation, no padding, no masked product."""
    attention_flops: float
    """Of the attention in one forward pass over all devices, of one piece of the batch."""
    layers: int
    vocabulary: int
    """Entries of the vocabulary projection."""
    stack: int
    """Entries of the smallest stack of all layers' kernels of one kind."""
    pieces: int = 1
    """In which prompts are read."""


def train_step(
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    shapes: Shapes,
    optimizer: optax.GradientTransformation,
    *,
    compute_dtype: Any,
    chunk: int,
    micro_batches: int = 1,
    live_reference: bool = False,
    adapter: lora.Lora | None = None,
    frozen_dtype: Any = jnp.float32,
) -> Program:
    """The step of preference training (sigmoid loss), of all parameters or of an adapter.

    Args:
        config: the model; ``param_dtype`` is of the master parameters.
        mesh: of real devices or of a topology's.
        shapes: of the global batch.
        optimizer: any Optax transformation.
        compute_dtype: what the parameters are cast to before the model runs.
        chunk: tokens projected on the vocabulary at one time.
        micro_batches: pieces of the batch.
        live_reference: pi0 is scored in the step (from a second copy of the parameters; with an
            adapter, from its base), in place of log-probabilities computed before.
        adapter: train low-rank updates only.
        frozen_dtype: in which an adapter's base and a second copy lie in memory.
    """
    model = language_model(config) if adapter is None else lora.language_model(config, adapter)
    params = parameters(model)
    copied = live_reference and adapter is None
    if adapter is not None:
        base = jax.tree.map(lambda leaf: _like(leaf, dtype=frozen_dtype), params["base"])
        params = params | {"base": base}
    ref_params = None
    if copied:
        ref_params = jax.tree.map(lambda leaf: _like(leaf, dtype=frozen_dtype), params)

    def init(key: Any, params: Any, ref_params: Any) -> states.TrainState:
        trainable = None if adapter is None else lambda path: path.startswith("lora/")
        return states.init(key, params, optimizer, trainable=trainable, ref_params=ref_params)

    state = jax.eval_shape(init, _key(), params, ref_params)
    shardings = meshes.state_shardings(state, partition.shardings(params, mesh))
    state = jax.tree.map(lambda leaf, at: _like(leaf, sharding=at), state, shardings)
    batch = _batch(shapes, cached=not live_reference)
    at = meshes.batch_sharding(mesh)
    batch = jax.tree.map(lambda leaf: _like(leaf, sharding=at), batch)
    scored = reference.cached
    if live_reference:
        # Without updates the adapted model is its base.
        bare = reference.base(lambda params: params | {"lora": {}})
        scored = reference.live if adapter is None else bare
    step = make_train_step(
        model,
        optimizer,
        functools.partial(objectives.sigmoid, kl_coef=0.1),
        reference=scored,
        report_coef=0.1,
        chunk=chunk,
        micro_batches=micro_batches,
        compute_dtype=compute_dtype,
        shardings=shardings,
    )

    def lower() -> Any:
        # Attention kernels are made at their first trace and keep arrays, which must lie on this
        # machine: trace once outside of the mesh, whose devices do not exist.
        jax.eval_shape(
            partial(scoring.log_prob, model, chunk=chunk), params, batch.prompts, batch.responses
        )
        return step.lower(state, batch)

    forward = forward_flops(config, params, shapes)
    # A frozen base has no gradient of its own: half of the backward pass's kernel products.
    useful = (3 if adapter is None else 2) * forward.linear + 3 * forward.attention
    kinds = {
        "trained parameters": state.params,
        "frozen parameters": state.frozen,
        "reference parameters": state.ref_params,
        "optimizer": state.opt_state,
        "batch": batch,
    }
    return Program(
        name="train step",
        lower=lower,
        arguments={kind: tree for kind, tree in kinds.items() if jax.tree.leaves(tree)},
        useful_flops=useful + (sum(forward) if live_reference else 0.0),
        attention_flops=forward.attention / micro_batches,
        **_landmarks(config, params),
    )


def sampling_mesh(
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    topology: Slice,
    *,
    tensor: int | None,
    eight: bool = False,
) -> jax.sharding.Mesh:
    """The mesh that a run on ``mesh`` would sample on (:func:`training.mesh.for_sampling`), with
    weights in the compute dtype or, with ``eight``, in eight bits.

    Raises:
        InputError: where ``tensor`` does not divide the devices.
    """
    held = sampled(config, eight)
    memory = None if topology.chip is None else topology.chip.memory
    try:
        return meshes.for_sampling(mesh, held, tensor=tensor, memory=memory)
    except ValueError as error:
        raise InputError(f"--sampling-tensor: {error}") from None


def sampled(config: ModelConfig, eight: bool) -> Any:
    """Shapes of the parameters that are sampled with."""
    cast = quantized.weights if eight else states.cast_floating
    return jax.eval_shape(
        lambda params: cast(params, config.dtype), parameters(language_model(config))
    )


def move(
    config: ModelConfig, mesh: jax.sharding.Mesh, on: jax.sharding.Mesh, *, eight: bool = False
) -> Program:
    """The largest parameter's way from the mesh of training to that of sampling, of the compute
    dtype or, with ``eight``, in eight bits; parameters move one after the other."""
    params = sampled(config, eight)
    leaves = jax.tree.leaves(
        jax.tree.map(
            lambda leaf, at, to: (_like(leaf, sharding=at), to),
            params,
            partition.shardings(params, mesh),
            partition.shardings(params, on),
        ),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    leaf, to = max(leaves, key=lambda pair: prod(pair[0].shape))
    return Program(
        name="move",
        lower=lambda: jax.jit(lambda x: x, out_shardings=to).lower(leaf),
        arguments={"parameter": leaf},
        useful_flops=0.0,
        attention_flops=0.0,
        **_landmarks(config, params),
    )


def sampler(
    config: ModelConfig, mesh: jax.sharding.Mesh, shapes: Shapes, *, eight: bool = False
) -> Program:
    """Sampling at temperature 1: one prefill, then ``response`` tokens for every sample.

    Parameters are in the compute dtype or, with ``eight``, in eight bits; the cache is as
    ``config.kv`` says. Sampling ends early when all rows have; the plan is for the longest run.
    """
    model = language_model(config)
    params = sampled(config, eight)
    laid = partition.shardings(params, mesh)
    params = jax.tree.map(lambda leaf, at: _like(leaf, sharding=at), params, laid)
    rows = meshes.batch_sharding(mesh)
    prompts = jax.tree.map(
        lambda leaf: _like(leaf, sharding=rows), _ragged(shapes.prompts, length=shapes.prompt)
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), shapes.prompts))
    keys = _like(keys, sharding=rows)
    compiled = jax.jit(
        partial(sampling.sample, samples=shapes.responses, max_new_tokens=shapes.response),
        static_argnums=1,
    )

    def lower() -> Any:
        jax.eval_shape(model.prefill, params, prompts)  # As in `train_step`.
        with jax.set_mesh(mesh):
            return compiled.lower(keys, model, params, prompts, Warp())

    forward = forward_flops(config, params, shapes)
    return Program(
        name="sampler",
        lower=lower,
        arguments={"parameters": params, "batch": (keys, prompts)},
        useful_flops=sum(forward),
        attention_flops=forward.attention,
        pieces=-(-shapes.prompt // (config.prefill_chunk or shapes.prompt)),
        **_landmarks(config, params),
    )


def parameters(model: LanguageModel) -> Any:
    """Shapes of a model's parameters."""
    return jax.eval_shape(model.init, _key())


def forward_flops(config: ModelConfig, params: Any, shapes: Shapes) -> Flops:
    """What the mathematics of one forward pass needs, whatever a program does.

    Two per kernel entry and token for the layers, two per entry of the vocabulary projection and
    *response* token, and four per head dimension for each pair of a query and a key that it sees
    (causal, within the window): arXiv 2001.08361, table 1, with attention counted exactly. A
    gradient costs twice as much again.
    """
    tokens = shapes.prompts * (shapes.prompt + shapes.responses * shapes.response)
    kernels = sum(prod(leaf.shape) for leaf in _kernels(params))
    predicted = shapes.prompts * shapes.responses * shapes.response
    vocabulary = 2.0 * config.vocab_size * config.hidden_size * predicted
    seen = 0
    for window in config.layer_windows:
        reach = np.arange(1, shapes.prompt + shapes.response + 1, dtype=np.int64)
        reach = np.minimum(reach, reach[-1] if window is None else window)
        seen += reach[: shapes.prompt].sum() + shapes.responses * reach[shapes.prompt :].sum()
    attention = 4.0 * config.heads * config.head_dim * shapes.prompts * float(seen)
    return Flops(2.0 * kernels * tokens + vocabulary, attention)


def shard_bytes(tree: Any) -> int:
    """Bytes of an abstract tree on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += prod(shape) * leaf.dtype.itemsize
    return total


def _landmarks(config: ModelConfig, params: Any) -> dict[str, int]:
    return {
        "layers": config.layers,
        "vocabulary": config.vocab_size * config.hidden_size,
        "stack": min(prod(leaf.shape) for leaf in _kernels(params)),
    }


def _kernels(params: Any) -> list[Any]:
    """Kernels of the layers, each a stack ``[L, ...]``."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [leaf for path, leaf in leaves if partition.path_name(path).endswith("/kernel")]


def _batch(shapes: Shapes, *, cached: bool) -> Batch:
    pairs = jax.ShapeDtypeStruct((shapes.prompts, shapes.responses), jnp.float32)
    weight: Any = jax.ShapeDtypeStruct((shapes.prompts,), jnp.float32)
    scored: Any = pairs if cached else None
    return Batch(
        prompts=_ragged(shapes.prompts, length=shapes.prompt),
        responses=_ragged(shapes.prompts, shapes.responses, length=shapes.response),
        weight=weight,
        ref_log_prob=scored,
    )


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _like(leaf: Any, *, dtype: Any = None, sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)


def _ragged(*rows: int, length: int) -> Ragged:
    ids: Any = jax.ShapeDtypeStruct((*rows, length), jnp.int32)
    lengths: Any = jax.ShapeDtypeStruct(rows, jnp.int32)
    return Ragged(ids, lengths)
