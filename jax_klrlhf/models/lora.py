r"""Low-rank adaptation: train a small update of chosen matrices, keep the base as the reference.

.. math:: W' = W + \frac{\alpha}{r} A B, \qquad A \in R^{in \times r},\; B = 0 \text{ at the start}

(arXiv 2106.09685, eq. 3). The parameters of an adapted model are ``{"base": ..., "lora": ...}``:
the policy is :func:`language_model` on both, the reference is the plain model on
``params["base"]``, the same arrays, so there is no second copy. No gradient reaches the base.
Adapters are read and written in PEFT's format.

Axes: ``L`` layers, ``r`` rank.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Array

from jax_klrlhf import placement
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import partition, pretrained, transformer, weights
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.config import ModelConfig

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@jax.tree_util.register_static
@dataclass(frozen=True, kw_only=True)
class Lora:
    """Static facts of an adapter."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "key", "value", "out", "up", "gate", "down")
    """Which projections of each layer are adapted."""

    def __post_init__(self) -> None:
        unknown = set(self.targets) - set(weights.LINEARS)
        if unknown or not self.targets or self.rank < 1:
            raise ValueError(
                f"rank={self.rank}, targets={self.targets}: rank is at least 1 and targets are "
                f"some of {', '.join(weights.LINEARS)}"
            )

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / self.rank


def language_model(
    config: ModelConfig,
    lora: Lora,
    *,
    constrain: Callable[[Array], Array] = partition.constrain,
) -> LanguageModel:
    """The adapted decoder: the same six functions of ``({"base", "lora"}, arrays)``."""
    plain = transformer.language_model(config, constrain=constrain, lora_scale=lora.scale)

    def start(key):
        base_key, lora_key = jax.random.split(key)
        base = transformer.language_model(config).init(base_key)
        return {"base": base, "lora": init(lora_key, config, lora)}

    return replace(plain, init=start)


def init(key: Array, config: ModelConfig, lora: Lora) -> Any:
    """Adapter parameters under which the policy equals the base: ``A`` uniform, ``B`` zero.

    Zeroing ``B``, not ``A``, keeps the first step's gradient on ``B`` from vanishing.
    """
    layers: dict[str, Any] = {}
    for number, (name, (inputs, outputs)) in enumerate(_widths(config, lora).items()):
        bound = 1 / math.sqrt(inputs)
        shape = (config.layers, inputs, lora.rank)
        part = jax.random.fold_in(key, number)
        layers[name] = {
            "a": jax.random.uniform(part, shape, config.param_dtype, -bound, bound),
            "b": jnp.zeros((config.layers, lora.rank, outputs), config.param_dtype),
        }
    return {"layers": layers}


def mask(params: Any) -> Any:
    """True at the adapter's leaves, False at the base's: for ``optax.masked`` and its like."""
    return {part: jax.tree.map(lambda _, p=part: p == "lora", params[part]) for part in params}


def merge(params: Any, lora: Lora) -> Any:
    """Plain parameters with the update added in, for :func:`transformer.language_model`."""
    merged = dict(params["base"])
    layers = dict(merged["layers"])
    for name, update in params["lora"]["layers"].items():
        kernel = layers[name]["kernel"]
        product = jnp.einsum("lir,lro->lio", update["a"], update["b"]) * lora.scale
        layers[name] = layers[name] | {"kernel": kernel + product.reshape(kernel.shape)}
    return merged | {"layers": layers}


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    lora: Lora,
    adapter: Any,
    *,
    base: str | None = None,
) -> Path:
    """Write ``params["lora"]`` as a PEFT adapter folder; ``base`` names the model it belongs to.

    With several hosts every process calls this and the first writes.
    """
    path = Path(path)
    tensors = {}
    for name, key in _keys(config, lora).items():
        for part, letter in (("a", "A"), ("b", "B")):
            whole = placement.host(adapter["layers"][name][part])
            for layer in range(config.layers):
                matrix = np.ascontiguousarray(whole[layer].T)
                tensors[f"{key.format(layer)}.lora_{letter}.weight"] = matrix
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(key.rpartition(".")[2] for key in _keys(config, lora).values()),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    with pretrained.whole_folder(path) as partial:
        if placement.leader():
            pretrained.write_tensors(partial / WEIGHTS, tensors)
            (partial / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    return path


def load(path: str | os.PathLike[str], config: ModelConfig) -> tuple[Lora, Any]:
    """A PEFT adapter folder for the model of ``config``: its facts and its parameters.

    Raises ``InputError`` naming the file and the key of what this adapter has beyond plain LoRA.
    """
    folder = Path(path)
    where = folder / SETTINGS
    settings = pretrained.read_json(where)
    plain = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        "use_rslora": (False, None),
        "use_dora": (False, None),
        "rank_pattern": ({}, None),
        "alpha_pattern": ({}, None),
        "modules_to_save": ([], None),
        "layers_to_transform": ([], None),
    }
    for key, right in plain.items():
        if settings.get(key) not in right:
            raise InputError(
                f"{where}: {key}={settings.get(key)!r} is not supported, only {right[0]!r}; merge "
                "the adapter with PEFT and load the merged model"
            )
    ours = {theirs.rpartition(".")[2]: name for name, (theirs, _, _) in weights.LINEARS.items()}
    modules = settings.get("target_modules")
    if not isinstance(modules, list) or not set(modules) <= set(ours):
        raise InputError(
            f"{where}: target_modules={modules!r}; supported is a list of {', '.join(ours)}"
        )
    targets = tuple(name for name in weights.LINEARS if name in {ours[m] for m in modules})
    lora = Lora(rank=settings["r"], alpha=float(settings["lora_alpha"]), targets=targets)
    file = folder / WEIGHTS
    if not file.is_file():
        raise InputError(f"{file}: no such file; an adapter folder holds {SETTINGS} and {WEIGHTS}")
    layers: dict[str, Any] = {}
    with safetensors.safe_open(str(file), framework="np") as tensors:
        present = set(tensors.keys())
        for name, key in _keys(config, lora).items():
            inputs, outputs = _widths(config, lora)[name]
            shapes = {"a": (lora.rank, inputs), "b": (outputs, lora.rank)}
            layers[name] = {}
            for part, shape in shapes.items():
                stack = []
                for layer in range(config.layers):
                    tensor = f"{key.format(layer)}.lora_{part.upper()}.weight"
                    if tensor not in present:
                        raise InputError(f"{file}: tensor {tensor} is missing")
                    matrix = tensors.get_tensor(tensor)
                    if matrix.shape != shape:
                        raise InputError(
                            f"{file}: tensor {tensor} has shape {list(matrix.shape)}, but this "
                            f"model asks for {list(shape)}"
                        )
                    stack.append(matrix.T)
                layers[name][part] = jnp.asarray(np.stack(stack), config.param_dtype)
    return lora, {"layers": layers}


def _widths(config: ModelConfig, lora: Lora) -> dict[str, tuple[int, int]]:
    """Flat input and output width of every adapted projection."""
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    widths = {
        "query": (hidden, query),
        "key": (hidden, key),
        "value": (hidden, key),
        "out": (query, hidden),
        "gate": (hidden, inner),
        "up": (hidden, inner),
        "down": (inner, hidden),
    }
    skipped = set() if config.gated else {"gate"}
    return {name: widths[name] for name in lora.targets if name not in skipped}


def _keys(config: ModelConfig, lora: Lora) -> dict[str, str]:
    """PEFT's name of every adapted projection, ``{}`` for the layer's number."""
    if config.family == "gpt2":
        raise ValueError(
            "GPT-2 keeps query, key and value in one matrix, so three adapters have no PEFT form: "
            "merge them and save the whole model"
        )
    return {
        name: f"base_model.model.model.layers.{{}}.{weights.LINEARS[name][0]}"
        for name in _widths(config, lora)
    }
