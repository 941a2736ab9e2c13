"""Which tensor on disk is which parameter, for every family.

The decoder stacks its layers, splits heads out and multiplies from the right (``x @ kernel``); a
Hugging Face file keeps a matrix per layer, mostly ``[out, in]``. A :class:`Source` says how to cut
and turn one into the other, so that any slice of a parameter is read from the matching slice of the
file, and the same table serves writing.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jax_klrlhf.models.config import ModelConfig


class Source(NamedTuple):
    """Where a parameter is on disk."""

    name: str
    """Tensor name; ``{}`` stands for the layer's number, and its absence for a single tensor."""
    contract: int | None = None
    """Leading axes (after the layer's) that are a matrix's input; 0: a vector, kept flat on disk;
    None: kept as it is."""
    transposed: bool = True
    """A matrix is ``[out, in]`` on disk (torch's Linear), else ``[in, out]`` (GPT-2's Conv1D)."""
    part: tuple[int, int] = (0, 1)
    """``(i, n)``: the i-th of n parameters side by side along the output axis of one tensor."""


def sources(config: ModelConfig) -> dict[str, Source]:
    """``parameter path -> Source`` of a family, ``layers/query/kernel -> model.layers.{}....``."""
    return _gpt2(config) if config.family == "gpt2" else _llama_like(config)


def _llama_like(config: ModelConfig) -> dict[str, Source]:
    found = {
        "embedding": Source("model.embed_tokens.weight"),
        "final_norm/scale": Source("model.norm.weight"),
    }
    if not config.tied:
        found["unembedding"] = Source("lm_head.weight", contract=1)
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms = {
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    if config.qk_norm:
        norms |= {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
    for ours, theirs in norms.items():
        found[f"layers/{ours}/scale"] = Source(f"model.layers.{{}}.{theirs}.weight")
    for ours, (theirs, contract, bias) in LINEARS.items():
        found[f"layers/{ours}/kernel"] = Source(f"model.layers.{{}}.{theirs}.weight", contract)
        if getattr(config, bias):
            found[f"layers/{ours}/bias"] = Source(f"model.layers.{{}}.{theirs}.bias", 0)
    return found


LINEARS = {
    "query": ("self_attn.q_proj", 1, "qkv_bias"),
    "key": ("self_attn.k_proj", 1, "qkv_bias"),
    "value": ("self_attn.v_proj", 1, "qkv_bias"),
    "out": ("self_attn.o_proj", 2, "out_bias"),
    "gate": ("mlp.gate_proj", 1, "mlp_bias"),
    "up": ("mlp.up_proj", 1, "mlp_bias"),
    "down": ("mlp.down_proj", 1, "mlp_bias"),
}
"""Our projection: its name in the Llama-like families, input axes, and the bias switch."""


def _gpt2(config: ModelConfig) -> dict[str, Source]:
    found = {
        "embedding": Source("transformer.wte.weight"),
        "positions": Source("transformer.wpe.weight"),
    }
    if not config.tied:
        found["unembedding"] = Source("lm_head.weight", contract=1)
    norms = {"layers/attention_norm": "h.{}.ln_1", "layers/mlp_norm": "h.{}.ln_2"}
    for ours, theirs in {**norms, "final_norm": "ln_f"}.items():
        found[f"{ours}/scale"] = Source(f"transformer.{theirs}.weight")
        found[f"{ours}/bias"] = Source(f"transformer.{theirs}.bias")
    linears = {
        "query": ("attn.c_attn", 1, (0, 3)),
        "key": ("attn.c_attn", 1, (1, 3)),
        "value": ("attn.c_attn", 1, (2, 3)),
        "out": ("attn.c_proj", 2, (0, 1)),
        "up": ("mlp.c_fc", 1, (0, 1)),
        "down": ("mlp.c_proj", 1, (0, 1)),
    }
    for ours, (theirs, contract, part) in linears.items():
        name = f"transformer.h.{{}}.{theirs}"
        found[f"layers/{ours}/kernel"] = Source(f"{name}.weight", contract, False, part)
        found[f"layers/{ours}/bias"] = Source(f"{name}.bias", 0, part=part)
    return found


def disk_shape(source: Source, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the whole tensor on disk, for a parameter of ``shape`` (without its layer axis)."""
    if source.contract is None:
        return tuple(shape)
    inputs = math.prod(shape[: source.contract])
    outputs = math.prod(shape[source.contract :]) * source.part[1]
    if source.contract == 0:
        return (outputs,)
    return (outputs, inputs) if source.transposed else (inputs, outputs)


def read(
    tensor: Callable[[tuple[slice, ...]], np.ndarray],
    source: Source,
    shape: Sequence[int],
    index: Sequence[slice],
) -> np.ndarray:
    """``parameter[index]`` (without the layer axis), reading that part of the file only.

    ``tensor`` gives a slice of the tensor on disk.
    """
    if source.contract is None:
        return tensor(tuple(index))
    inputs = _run(shape[: source.contract], index[: source.contract])
    outputs = _run(shape[source.contract :], index[source.contract :])
    offset = source.part[0] * math.prod(shape[source.contract :])
    columns = slice(offset + outputs.rows.start, offset + outputs.rows.stop)
    if source.contract == 0:
        found = tensor((columns,))
    elif source.transposed:
        found = tensor((columns, inputs.rows)).T
    else:
        found = tensor((inputs.rows, columns))
    return found.reshape(*inputs.shape, *outputs.shape)[(*inputs.rest, *outputs.rest)]


def write(source: Source, parameter: np.ndarray) -> np.ndarray:
    """The tensor on disk (one part of it where several share one) of a parameter."""
    if source.contract is None:
        return parameter
    inputs = math.prod(parameter.shape[: source.contract])
    if source.contract == 0:
        return parameter.reshape(-1)
    matrix = parameter.reshape(inputs, -1)
    return np.ascontiguousarray(matrix.T) if source.transposed else matrix


class _Run(NamedTuple):
    """One contiguous range of a flattened group of axes, and what is left to cut from it."""

    rows: slice
    shape: tuple[int, ...]
    rest: tuple[slice, ...]


def _run(shape: Sequence[int], index: Sequence[slice]) -> _Run:
    bounds = [i.indices(size) for i, size in zip(index, shape, strict=True)]
    if not bounds:
        return _Run(slice(0, 1), (), ())
    begin, end, _ = bounds[0]
    width = math.prod(shape[1:])
    rest = (slice(None), *(slice(a, b) for a, b, _ in bounds[1:]))
    return _Run(slice(begin * width, end * width), (end - begin, *shape[1:]), rest)
