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
from collections import defaultdict
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

    GPT-2 keeps query, key and value in one matrix. The three adapters become one of three times the
    rank, by blocks: the same function at the same scale.

    With several hosts every process calls this and the first writes.
    """
    path = Path(path)
    modules, tensors = _modules(config, lora), {}
    for module, names in modules.items():
        key = _PREFIX[config.family == "gpt2"] + module
        parts = {n: jax.tree.map(placement.host, adapter["layers"].get(n)) for n in names}
        for layer in range(config.layers):
            found: Any = {n: None if p is None else _pair(p, layer) for n, p in parts.items()}
            a, b = found[names[0]] if names != FUSED else _fuse(found)
            tensors[f"{key.format(layer)}.lora_A.weight"] = np.ascontiguousarray(a)
            tensors[f"{key.format(layer)}.lora_B.weight"] = np.ascontiguousarray(b)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(_short(config, module) for module in modules),
        **_patterns(lora, fused=FUSED in modules.values()),
        # GPT-2's matrices are [in, out] on disk.
        "fan_in_fan_out": config.family == "gpt2",
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

    Raises ``InputError`` naming the file and the key of what this adapter has beyond plain LoRA, or
    that is damaged.
    """
    folder = Path(path)
    where = folder / SETTINGS
    settings = pretrained.read_json(where)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise InputError(f"{where}: r={rank!r} and lora_alpha={alpha!r}; rank is at least 1")
    lora = Lora(rank=rank, alpha=float(alpha))
    blocks = config.family == "gpt2" and settings.get("rank_pattern") not in ({}, None)
    plain = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        "use_rslora": (False, None),
        "use_dora": (False, None),
        **{key: (x,) if blocks else (x, {}, None) for key, x in _patterns(lora, blocks).items()},
        "modules_to_save": ([], None),
        "layers_to_transform": ([], None),
    }
    for key, right in plain.items():
        if settings.get(key) not in right:
            raise InputError(
                f"{where}: {key}={settings.get(key)!r} is not supported, only {right[0]!r}; merge "
                "the adapter with PEFT and load the merged model"
            )
    named = settings.get("target_modules")
    every = _modules(config, lora)
    known = {
        alias: [m for m in every if alias in (m, _short(config, m), m.rpartition(".")[2])]
        for m in every
        for alias in (m, _short(config, m), m.rpartition(".")[2])
    }
    if not isinstance(named, list) or not named or not all(str(n) in known for n in named):
        raise InputError(
            f"{where}: target_modules={named!r}; supported is a list of {', '.join(sorted(known))}"
        )
    asked = {module for name in named for module in known[str(name)]}
    file, widths = folder / WEIGHTS, _widths(config, lora)
    layers: dict[str, Any] = defaultdict(lambda: {"a": [], "b": []})
    with _opened(file) as tensors:
        for module, names in every.items():
            if module not in asked:
                continue
            wide = 3 * rank if blocks and names == FUSED else rank
            shapes = {
                "A": (wide, widths[names[0]][0]),
                "B": (sum(widths[name][1] for name in names), wide),
            }
            key = _PREFIX[config.family == "gpt2"] + module
            for layer in range(config.layers):
                a, b = (
                    _matrix(tensors, file, f"{key.format(layer)}.lora_{letter}.weight", shape)
                    for letter, shape in shapes.items()
                )
                apart = _split(a, b, blocks=blocks) if names == FUSED else {names[0]: (a, b)}
                if blocks and names == FUSED and not np.array_equal(_fuse(apart)[1], b):
                    raise InputError(
                        f"{file}: query, key and value of layer {layer} share their low rank; "
                        "merge the adapter with PEFT and load the merged model"
                    )
                for name, (mine, theirs) in apart.items():
                    layers[name]["a"].append(mine.T)
                    layers[name]["b"].append(theirs.T)
    found = {
        name: jax.tree.map(
            lambda stack: jnp.asarray(np.stack(stack), config.param_dtype),
            layers[name],
            is_leaf=lambda x: isinstance(x, list),
        )
        for name in weights.LINEARS
        # In blocks, a part whose A is zero was never adapted.
        if name in layers and not (blocks and name in FUSED and not np.any(layers[name]["a"]))
    }
    return replace(lora, targets=tuple(found)), {"layers": found}


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


FUSED = ("query", "key", "value")
"""What GPT-2 keeps in one matrix, ``attn.c_attn``."""
_GPT2 = {
    "attn.c_attn": FUSED,
    "attn.c_proj": ("out",),
    "mlp.c_fc": ("up",),
    "mlp.c_proj": ("down",),
}
_PREFIX = ("base_model.model.model.layers.{}.", "base_model.model.transformer.h.{}.")
"""Of PEFT's names, of the Llama-like families and of GPT-2."""


def _modules(config: ModelConfig, lora: Lora) -> dict[str, tuple[str, ...]]:
    """PEFT's name, within a layer, of every adapted matrix: which projections of ours it holds."""
    ours = _widths(config, lora)
    if config.family == "gpt2":
        return {module: names for module, names in _GPT2.items() if set(names) & set(ours)}
    return {weights.LINEARS[name][0]: (name,) for name in ours}


def _short(config: ModelConfig, module: str) -> str:
    """As ``target_modules`` has it; of GPT-2's two ``c_proj`` each by its whole name."""
    return module if config.family == "gpt2" else module.rpartition(".")[2]


def _patterns(lora: Lora, fused: bool) -> dict[str, Any]:
    """Rank and alpha of the fused matrix, whose ratio is that of all others."""
    if not fused:
        return {"rank_pattern": {}, "alpha_pattern": {}}
    return {
        "rank_pattern": {"attn.c_attn": 3 * lora.rank},
        "alpha_pattern": {"attn.c_attn": 3 * lora.alpha},
    }


def _pair(part: dict[str, np.ndarray], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """One layer's matrices, ``A [r, in]`` and ``B [out, r]``."""
    return part["a"][layer].T, part["b"][layer].T


def _fuse(found: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """One pair from three, of which some may be None: A stacked, B in blocks."""
    known = next(pair for pair in found.values() if pair is not None)
    pairs = [tuple(map(np.zeros_like, known)) if p is None else p for p in found.values()]
    (width, rank), dtype = known[1].shape, known[1].dtype
    b = np.zeros((len(pairs) * width, len(pairs) * rank), dtype)
    for i, (_, mine) in enumerate(pairs):
        b[i * width : (i + 1) * width, i * rank : (i + 1) * rank] = mine
    return np.concatenate([a for a, _ in pairs]), b


def _split(a: np.ndarray, b: np.ndarray, *, blocks: bool) -> dict[str, Any]:
    """The inverse of :func:`_fuse`; without ``blocks``, three pairs that share their A."""
    outputs = np.split(b, len(FUSED))
    if not blocks:
        return {name: (a, mine) for name, mine in zip(FUSED, outputs, strict=True)}
    inputs = np.split(a, len(FUSED))
    return {
        name: (inputs[i], np.split(outputs[i], len(FUSED), axis=1)[i])
        for i, name in enumerate(FUSED)
    }


def _opened(file: Path) -> Any:
    if not file.is_file():
        raise InputError(f"{file}: no such file; an adapter folder holds {SETTINGS} and {WEIGHTS}")
    try:
        return safetensors.safe_open(str(file), framework="np")
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{file}: not a safetensors file ({error}); copy it again") from error


def _matrix(tensors: Any, file: Path, name: str, shape: tuple[int, int]) -> np.ndarray:
    if name not in tensors.keys():  # noqa: SIM118  # It is no mapping.
        raise InputError(f"{file}: tensor {name} is missing")
    found = tensors.get_tensor(name)
    if found.shape != shape:
        raise InputError(
            f"{file}: tensor {name} has shape {list(found.shape)}, but this model asks for "
            f"{list(shape)}"
        )
    if found.dtype.kind in "iub" or not np.isfinite(found).all():
        raise InputError(f"{file}: tensor {name} has entries that are no finite numbers")
    return found
