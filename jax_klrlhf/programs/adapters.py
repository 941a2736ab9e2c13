"""Low-rank adapters in the commands: put beside a loaded model, trained alone, saved."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_klrlhf import models
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import lora, partition
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.programs.config import Adapter
from jax_klrlhf.training.rounds.parts import Improve, Improved


def attach(
    key: Any, loaded: models.Loaded, adapter: Adapter, *, mesh: Mesh | None = None
) -> tuple[Any, Any, lora.Lora | None]:
    """Model, parameters and adapter: the loaded ones, or those with low-rank updates beside.

    Raises:
        InputError: where the adapter's rank or targets are none.
    """
    if adapter.rank == 0:
        return loaded.model, loaded.params, None
    try:
        facts = lora.Lora(rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets)
    except ValueError as error:
        raise InputError(f"lora: {error}") from None
    # Masters of what is trained are float32, whatever the base lies in.
    masters = dataclasses.replace(loaded.config, param_dtype=jnp.float32)
    start = partial(lora.init, config=masters, lora=facts)
    placed = None if mesh is None else partition.shardings(jax.eval_shape(start, key), mesh)
    update = jax.jit(start, out_shardings=placed)(key)
    return lora.language_model(loaded.config, facts), {"base": loaded.params, "lora": update}, facts


def is_adapter(path: str) -> bool:
    """Whether a parameter of an adapted model is the adapter's, by its path."""
    return path.startswith("lora/")


def base(params: Any) -> Any:
    """The base alone: an adapted model without updates."""
    return {"base": params["base"], "lora": {}}


def alone(improve: Improve) -> Improve:
    """``improve`` whose policies share the base's arrays: one base for the policies of all rounds,
    in memory and on disk."""

    def shared(key: Any, situation: Any) -> Improved:
        found = improve(key, situation)
        return found._replace(params=situation.policies.base | {"lora": found.params["lora"]})

    return shared


def save(
    folder: Path,
    config: ModelConfig,
    params: Any,
    tokenizer: Any,
    adapter: lora.Lora | None,
    *,
    base: str,
    merged: bool,
    generation: Mapping[str, Any] | None,
) -> str:
    """The policy in ``folder/model``, and an adapter in ``folder/adapter``; without ``merged`` the
    adapter alone. Returns the one that is to be opened."""
    if adapter is not None:
        named = str(Path(base).expanduser())
        lora.save(folder / "adapter", config, adapter, params["lora"], base=named)
        if not merged:
            return "adapter"
        params = jax.jit(lora.merge)(params, adapter)
    models.save(folder / "model", config, params, tokenizer, generation=generation)
    return "model"
