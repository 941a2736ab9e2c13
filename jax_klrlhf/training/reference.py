r"""Log-probabilities of the reference policy pi0: where a training step takes them from.

A reference is a function ``(log_prob, params, ref_params, batch) -> [B, K] or None`` handed to the
step: :func:`cached` reads them from the batch, :func:`live` scores with the state's ``ref_params``,
:func:`base` with the policy's own frozen base (LoRA: no second copy), :func:`free` has none
(SimPO, maximum likelihood). pi0 is the reference by construction: the state holds its
fingerprint, and a cache on disk that another model made is refused by name.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jax_klrlhf import placement
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import scoring
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.training.state import cast_floating

LogProb = Callable[[Any, Any], Float[Array, "B K"]]
"""``log_prob(params, batch)``: scores the batch's responses."""
Reference = Callable[[LogProb, Any, Any, Any], Float[Array, "B K"] | None]


def cached(log_prob: LogProb, params: Any, ref_params: Any, batch: Any) -> Float[Array, "B K"]:
    """Computed before (:func:`precompute`) and carried by the batch as ``ref_log_prob``."""
    del log_prob, params, ref_params
    if batch.ref_log_prob is None:
        raise ValueError(
            "reference.cached: the batch has no ref_log_prob. Compute it once with "
            "reference.precompute, or hand in reference.live with init(..., ref_params=params)."
        )
    return batch.ref_log_prob


def live(log_prob: LogProb, params: Any, ref_params: Any, batch: Any) -> Float[Array, "B K"]:
    """Scored in the step with the state's ``ref_params``, which never change."""
    del params
    if ref_params is None:
        raise ValueError("reference.live: the state has no reference; give init(ref_params=...).")
    return jax.lax.stop_gradient(log_prob(ref_params, batch))


def base(strip: Callable[[Any], Any]) -> Reference:
    """The policy with its adapters taken away: ``strip(params)`` are the base's parameters."""

    def reference(log_prob: LogProb, params: Any, ref_params: Any, batch: Any) -> Any:
        del ref_params
        return jax.lax.stop_gradient(log_prob(strip(params), batch))

    return reference


def free(log_prob: LogProb, params: Any, ref_params: Any, batch: Any) -> None:
    """No reference: for losses that read log-probabilities alone."""
    del log_prob, params, ref_params, batch


def make_log_prob(model: LanguageModel, *, chunk: int = scoring.CHUNK) -> LogProb:
    """Compiled ``log_prob(params, batch) -> [B, K]`` of a batch's responses."""

    @jax.jit
    def log_prob(params: Any, prompts: Any, responses: Any) -> Float[Array, "B K"]:
        return scoring.log_prob(model, params, prompts, responses, chunk=chunk)

    return lambda params, batch: log_prob(params, batch.prompts, batch.responses)


def precompute(
    model: LanguageModel, params: Any, batches: Iterable[Any], *, chunk: int = scoring.CHUNK
) -> list[Any]:
    """The batches with ``ref_log_prob`` filled in: one pass of pi0, before training begins."""
    log_prob = make_log_prob(model, chunk=chunk)
    return [batch._replace(ref_log_prob=np.asarray(log_prob(params, batch))) for batch in batches]


def tabulate(
    model: LanguageModel,
    params: Any,
    batches: Iterable[Any],
    *,
    rows: int,
    responses: int,
    compute_dtype: Any = None,
    chunk: int = scoring.CHUNK,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "rows K"]:
    """pi0's log-probabilities of a whole data set, by row number.

    ``batches`` (of ``prompts``, ``responses`` and ``row``, the rows' numbers) visit each row at
    least once. ``compute_dtype`` and ``mesh`` are the training step's, so that the ratio of a
    policy that has not moved is 1.
    """
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, out_shardings=replicated)
    def score(params: Any, prompts: Any, answers: Any, index: Any) -> Any:
        found = scoring.log_prob(
            model, cast_floating(params, compute_dtype), prompts, answers, chunk=chunk
        )
        return index, found

    table = np.full((rows, responses), np.nan, np.float32)
    for batch in batches:
        laid = placement.put((batch.prompts, batch.responses, batch.row), mesh)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            index, found = jax.device_get(score(params, *laid))
        table[index] = found
    missing = int(np.isnan(table).any(axis=1).sum())
    if missing:
        raise ValueError(f"tabulate: {missing} of {rows} rows were not visited, or are not finite.")
    return table


def on_host(params: Any, compute_dtype: Any = None) -> Callable[[], Any]:
    """Keep parameters in host memory; the function returned puts them back where they lay.

    For what is needed now and then. They are kept in the type that they are computed in, and each
    process keeps the parts that lie on its own devices.
    """

    def take(leaf: Any) -> Callable[[], Any]:
        if not isinstance(leaf, jax.Array):
            return lambda: leaf
        shape, sharding = leaf.shape, leaf.sharding
        kept: dict[str, np.ndarray] = {}
        for shard in leaf.addressable_shards:
            if str(shard.index) not in kept:
                kept[str(shard.index)] = np.array(shard.data, copy=True)
        places = [(shard.device, str(shard.index)) for shard in leaf.addressable_shards]

        def put() -> Any:
            parts = [jax.device_put(kept[index], device) for device, index in places]
            return jax.make_array_from_single_device_arrays(shape, sharding, parts)

        return put

    cast = jax.tree.map(take, cast_floating(params, compute_dtype))
    return lambda: jax.tree.map(lambda put: put(), cast)


class Identity(NamedTuple):
    """What a cache of reference log-probabilities is the cache of: a fingerprint of each."""

    model: str
    """:func:`state.fingerprint` of pi0."""
    data: str
    tokenizer: str
    lengths: str
    """What prompts and responses were cut to."""


def save_cache(path: Path, ref_log_prob: Float[np.ndarray, "rows K"], identity: Identity) -> None:
    """Write a cache in one step: a reader sees the old file or the new.

    Raises:
        InputError: where it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"content": _digest(ref_log_prob)}
        safetensors.numpy.save_file(
            {"ref_log_prob": ref_log_prob}, temporary, metadata=identity._asdict() | content
        )
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path}: the reference cache could not be written ({error}); make room or name "
            "another place."
        ) from None


def load_cache(path: Path, identity: Identity) -> Float[np.ndarray, "rows K"]:
    """Read a cache that was made of the same model, data, tokenizer and lengths.

    Raises:
        InputError: where it was made of others (which is named), is damaged, or is no cache.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            found = file.metadata() or {}
            values = file.get_tensor("ref_log_prob")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        text = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not a reference cache ({text}); delete it.") from None
    for part, ours in identity._asdict().items():
        theirs = found.get(part, "unknown")
        if theirs != ours:
            raise InputError(
                f"{path}: computed with another {part}: {theirs[:16]} there, {ours[:16]} in this "
                "run; delete the file to compute it again, or name another."
            )
    if found.get("content") != _digest(values):
        raise InputError(
            f"{path}: damaged, its content is not what was written; delete the file to compute it "
            "again."
        )
    return values


def _digest(values: np.ndarray) -> str:
    head = f"{values.dtype} {values.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()
