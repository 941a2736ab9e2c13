"""Every phase's result on disk, so that a killed run goes on from the phase it was in.

A phase leaves two files in its round's folder: its arrays (safetensors) and, written last, a
manifest with the fingerprint of its inputs and of its content. Arrays that are pi0's own (the base
of a low-rank adapter) are named there and not written again. Both appear in one step (written
under another name, then renamed), so a reader finds a whole phase or none. Arrays that lie over
several devices are written by Orbax, each device its own part, and fingerprinted where they lie: an
8B policy is whole nowhere. Inputs are chained: a
phase's fingerprint covers the run's own (pi0, key, data, configuration) and the content of every
phase before it. A result that was made of other inputs is refused by name, never used.

Without a folder, results stay in memory.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from jax_klrlhf import placement
from jax_klrlhf.errors import InputError
from jax_klrlhf.results import Metric, output_folder, read_json, write_json
from jax_klrlhf.training import state as states
from jax_klrlhf.training.checkpoint import quietly
from jax_klrlhf.training.metrics import Metrics
from jax_klrlhf.training.state import path_name

T = TypeVar("T")
_SMALL = 2**16
"""Entries of an array that is hashed in host memory rather than by a program of its own."""
ANY = 0
"""A leaf of a template whose shape is free; absent from disk, it is None."""


class Journal:
    """The phases of one run, in order.

    Args:
        folder: where results are left; None: nowhere.
        identity: fingerprints of what the run is made of, by name.

    Raises:
        InputError: where the folder cannot be written, or holds a run made of something else,
            which is named.
    """

    def __init__(self, folder: str | Path | None, identity: Mapping[str, str]):
        self.folder = None if folder is None else output_folder(folder)
        self._chain = _text_digest(json.dumps(dict(identity), sort_keys=True))
        self.computed: list[str] = []
        """Phases that this process computed itself, ``round/phase``."""
        if self.folder is not None:
            self._claim(dict(identity))

    def phase(
        self, number: int, name: str, compute: Callable[[], tuple[T, Metrics]], *, like: T
    ) -> tuple[T, Metrics]:
        """The result of a phase and its metrics: read where it is there, computed where it isn't.

        ``like`` has the result's structure; a leaf is :data:`ANY`, or an array that gives shape,
        type and place (a parameter's sharding). A leaf of the result that is the very array of
        ``like`` is not written; it is taken from there again.

        Raises:
            InputError: where what is on disk was made of other inputs, or is damaged.
        """
        base = None if self.folder is None else round_folder(self.folder, number) / name
        if base is not None and placement.agreed(base.with_suffix(".json").exists()):
            value, metrics, content = self._read(base, like)
        else:
            began = time.perf_counter()
            value, metrics = compute()
            content = digest(value)
            self.computed.append(f"{number}/{name}")
            if base is not None:
                given = _given(value, like)
                self._write(base, value, metrics, content, time.perf_counter() - began, given)
        self._chain = _text_digest(f"{self._chain} {number} {name} {content}")
        return value, metrics

    def fold(self, tree: Any) -> None:
        """Let what follows depend on these arrays too."""
        self._chain = _text_digest(f"{self._chain} {digest(tree)}")

    def _claim(self, identity: dict[str, str]) -> None:
        assert self.folder is not None
        path = self.folder / "run.json"
        if path.exists():
            there = read_json(path, remedy=f"name another folder, or delete {self.folder}")
            for part in sorted(identity.keys() | there.keys()):
                if identity.get(part) != there.get(part):
                    raise InputError(
                        f"{self.folder}: holds a run with another {part} "
                        f"({str(there.get(part))[:60]} there, {str(identity.get(part))[:60]} now); "
                        "give the same to go on with it, or name another folder."
                    )
        placement.lead(lambda: None if path.exists() else write_json(path, identity))

    def _write(
        self,
        base: Path,
        value: Any,
        metrics: Metrics,
        content: str,
        seconds: float,
        given: Sequence[str],
    ) -> None:
        manifest = {
            "inputs": self._chain,
            "content": content,
            "seconds": round(seconds, 3),
            "metrics": {key: _plain(metric) for key, metric in metrics.items()},
        }
        if given:
            manifest["given"] = list(given)
        leaves = {name: leaf for name, leaf in _leaves(value) if name not in given}
        placement.lead(lambda: base.parent.mkdir(parents=True, exist_ok=True))
        try:
            if any(_spread(leaf) for leaf in leaves.values()):
                with _orbax() as store:
                    store.save(_spread_folder(base), leaves, force=True)
            else:
                tensors = {name: placement.host(leaf) for name, leaf in leaves.items()}
                placement.lead(lambda: _save_file(tensors, base.with_suffix(".safetensors")))
        except InputError:
            raise
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise InputError(
                f"{base}: could not be written ({' '.join(str(error).split())[:200]}); make room, "
                "or name another folder, and start again: the phases before it are kept."
            ) from None
        placement.lead(
            lambda: write_json(base.with_suffix(".json"), manifest | {"seal": _seal(manifest)})
        )

    def _read(self, base: Path, like: T) -> tuple[T, Metrics, str]:
        path = base.with_suffix(".json")
        remedy = f"delete it and {base.name}'s arrays, and what comes after, to compute them again"
        manifest = read_json(path, remedy=remedy)
        if manifest.pop("seal", None) != _seal(manifest):
            raise InputError(
                f"{path}: damaged or edited, its content is not what was written; {remedy}."
            )
        if manifest["inputs"] != self._chain:
            raise InputError(
                f"{base}: made of other inputs than this run's ({manifest['inputs'][:12]} there, "
                f"{self._chain[:12]} now); name another folder, or delete this round's and later "
                "ones to compute them again."
            )
        value = _load(base, like, given=manifest.get("given", ()))
        if digest(value) != manifest["content"]:
            raise _damaged(base, "its content is not what was written")
        metrics = {
            key: Metric(float("nan") if m["value"] is None else m["value"], m["stderr"], m["n"])
            for key, m in manifest["metrics"].items()
        }
        return value, metrics, manifest["content"]

    def stored(self, number: int, name: str, like: Any) -> Any:
        """A result that is on disk, unchecked against the chain: the phases before it were."""
        assert self.folder is not None
        base = round_folder(self.folder, number) / name
        manifest = read_json(base.with_suffix(".json"), remedy="start the run again")
        return _load(base, like, given=manifest.get("given", ()))


class Stored(Sequence[Any]):
    """pi0 and the policy of every round: read from disk when asked for, or held in memory."""

    def __init__(self, journal: Journal, base: Any, *, first: int):
        self._journal, self._base, self._first = journal, base, first
        self._held: list[Any] = []
        self._count = 0

    def append(self, params: Any) -> None:
        """The policy of the next round."""
        self._count += 1
        self._held.append(params)
        if self._journal.folder is not None:
            # The last one is in use anyway; the others wait on disk.
            self._held = [None] * (self._count - 1) + [params]

    def __len__(self) -> int:
        return 1 + self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index == 0:
            return self._base
        held = self._held[index - 1]
        if held is not None:
            return held
        return self._journal.stored(self._first + index - 1, "fit", self._base)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


def round_folder(folder: Path, number: int) -> Path:
    """Where a round's phases are left."""
    return folder / f"round-{number:03d}"


def digest(tree: Any) -> str:
    """Fingerprint of a pytree of arrays: names, shapes, types and every bit.

    What is large or lies over several devices is hashed there (:func:`state.digest`), the rest in
    host memory, to the same digits: the name of a policy does not depend on the mesh.
    """
    there = {
        name: leaf
        for name, leaf in _leaves(tree)
        if isinstance(leaf, jax.Array) and (_spread(leaf) or leaf.size > _SMALL)
    }
    here = {name: placement.host(leaf) for name, leaf in _leaves(tree) if name not in there}
    total = states.host_digest(here)
    if there:
        total = total + np.asarray(states.digest(there))
    return states.fingerprint_text(total)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _spread(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


def _spread_folder(base: Path) -> Path:
    return base.with_suffix(".arrays").absolute()


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.StandardCheckpointer]:
    """Orbax, which writes under another name and renames when every process is done."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    store = ocp.StandardCheckpointer()
    try:
        yield store
        store.wait_until_finished()
    finally:
        store.close()


def _save_file(tensors: dict[str, np.ndarray], target: Path) -> None:
    partial = target.with_name(target.name + ".tmp")
    safetensors.numpy.save_file(tensors, partial)
    os.replace(partial, target)


def _given(value: Any, like: Any) -> list[str]:
    """Leaves of ``value`` that are arrays of ``like``, by name."""
    known = dict(_leaves(like))
    return [
        name for name, leaf in _leaves(value)
        if isinstance(leaf, jax.Array) and known.get(name) is leaf
    ]  # fmt: skip


def _load(base: Path, like: T, *, given: Sequence[str] = ()) -> T:
    """What a phase left, of the structure and in the places of ``like``, whose own arrays it has
    where they were ``given``."""
    folder = _spread_folder(base)
    if not folder.exists():
        try:
            tensors = safetensors.numpy.load_file(base.with_suffix(".safetensors"))
        except (OSError, safetensors.SafetensorError) as error:
            raise _damaged(base, str(error)) from None
        return _restore(base, like, tensors, given)
    refused: list[InputError] = []
    found: Any = None
    # Orbax's own threads would print what they fail of, beside the one line.
    with quietly() as failed, _orbax() as store:
        kept: Any = store.metadata(folder).item_metadata
        there: dict[str, Any] = dict(getattr(kept, "tree", kept))
        target = {}
        for name, leaf in _leaves(like):
            if name in given:
                continue
            if isinstance(leaf, int):
                target[name] = np.empty(there[name].shape, there[name].dtype)
                continue
            try:
                _check(base, name, there.get(name), leaf)
            except InputError as error:
                refused.append(error)
            target[name] = leaf
            if isinstance(leaf, jax.Array):
                target[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        if not refused:
            found = store.restore(folder, target)
    if refused:
        raise refused[0]
    if failed:
        raise _damaged(base, failed[0][:200])
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    named = {path_name(path): leaf for path, leaf in paths}
    return jax.tree.unflatten(structure, [found.get(name, named[name]) for name in named])


def _check(base: Path, name: str, value: Any, leaf: Any) -> None:
    """Refuse what is not of the shape and type that this run has."""
    if value is None or tuple(value.shape) != leaf.shape or value.dtype != leaf.dtype:
        there = "absent" if value is None else f"{value.dtype}{list(value.shape)}"
        raise InputError(
            f"{base}: {name} is {there}, this run's is {leaf.dtype}{list(leaf.shape)}; give "
            "the model and belief of the saved run, or name another folder."
        )


def _restore(base: Path, like: Any, tensors: Mapping[str, np.ndarray], given: Sequence[str]) -> Any:
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    found = []
    for path, leaf in paths:
        name = path_name(path)
        if name in given:
            found.append(leaf)
            continue
        if isinstance(leaf, int):
            found.append(tensors.get(name))
            continue
        _check(base, name, tensors.get(name), leaf)
        found.append(_place(tensors[name], leaf))
    return jax.tree.unflatten(structure, found)


def _place(value: np.ndarray, like: Any) -> Any:
    if not isinstance(like, jax.Array):
        return value
    if not like.is_fully_addressable:
        return placement.from_host(value, like.sharding)
    return jax.device_put(value, like.sharding) if like.committed else jax.numpy.asarray(value)


def _damaged(base: Path, reason: str) -> InputError:
    return InputError(
        f"{base}.safetensors: damaged ({reason}); delete it and its .json, and what comes after "
        "it, to compute them again."
    )


def _plain(metric: Metric) -> dict[str, Any]:
    """A metric as JSON has it, which has no NaN."""
    value, stderr, n = metric
    finite = lambda x: None if x is None or not math.isfinite(x) else float(x)  # noqa: E731
    return {"value": finite(value), "stderr": finite(stderr), "n": None if n is None else int(n)}


def _seal(manifest: Mapping[str, Any]) -> str:
    return _text_digest(json.dumps(manifest, sort_keys=True))


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
