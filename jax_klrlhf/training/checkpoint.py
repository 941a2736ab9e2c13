"""Checkpoints: a run killed at any moment goes on to the same bits.

A checkpoint holds the carried state (step, trained parameters, optimizer, key, fingerprint of pi0),
the position in the data, the configuration and what the log remembers (:mod:`.history`). Orbax
writes it asynchronously under a temporary name and renames it when it is whole, so a reader finds
the last whole one whatever happened since; what a killed run left half-written is removed on
opening.

Disks and copies do worse than kills: a file is cut, empty, or one bit of it is another. Each
checkpoint carries a checksum of its arrays and a digest of the rest; one that is not what was
written is left aside for the one before it, with a word of it.

Frozen parameters and the reference are not saved: they are read from where they came from, and the
fingerprint says whether they are the same.
"""

import gc
import hashlib
import json
import logging
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_klrlhf import placement
from jax_klrlhf.errors import InputError
from jax_klrlhf.results import output_folder
from jax_klrlhf.training.state import TrainState, checksum, fingerprint_text, path_name

_STATE, _EXTRA = "state", "extra"
_SETTLE = 30.0  # seconds that the writers of a failed save are waited for


class Restored(NamedTuple):
    """What a checkpoint held."""

    state: TrainState
    data: Any
    """The position in the data."""
    log: Any
    """What the log remembers; None where nothing was given."""
    damaged: tuple[str, ...] = ()
    """Of each later checkpoint that could not be read, what is wrong with it. It is gone."""


class _Damaged(Exception):
    """A checkpoint is not what was written."""


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
        folder: made where it does not exist.
        keep: how many of the latest are kept.

    Raises:
        InputError: where the folder cannot be written.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        self.folder = output_folder(folder).absolute()
        # Orbax logs each phase of a save, and an error once per thread it passes before it is
        # raised here.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._before: set[threading.Thread] = set()
        self._saving: int | None = None
        self._failed = False
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                lightweight_initialize=True,  # reads no metadata, which may be damaged
            ),
            item_handlers={
                _STATE: ocp.StandardCheckpointHandler(),
                _EXTRA: ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def latest(self) -> int | None:
        """Step of the last checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, *, data: Any, config: Any, log: Any = None) -> None:
        """Begin to save ``state`` under its own step; a step already saved is left as it is.

        Returns when the arrays have been copied; writing goes on beside the run. ``data`` (the
        position), ``config`` and ``log`` are anything JSON holds.

        Raises:
            InputError: where this or the previous save could not be written.
        """
        step = int(state.step)
        self.wait()
        if step in self._manager.all_steps():
            return
        self._before, self._saving = set(threading.enumerate()), step
        saved = _saved(state)
        extra = {
            "data": data,
            "config": config,
            "log": log,
            "shapes": _shapes(saved),
            "reference": fingerprint_text(state.fingerprint),
            "checksum": fingerprint_text(checksum(saved)),
        }
        # Through JSON once, so that what is read back has the digest of what was given.
        extra = json.loads(json.dumps(extra))
        items = ocp.args.Composite(
            **{
                _STATE: ocp.args.StandardSave(saved),
                _EXTRA: ocp.args.JsonSave(extra | {"digest": _digest(extra)}),
            }
        )
        self._write(lambda: self._manager.save(step, args=items))

    def wait(self) -> None:
        """Return when everything begun is on disk.

        Raises:
            InputError: where it could not be written.
        """
        self._write(self._manager.wait_until_finished)

    def _write(self, function: Callable[[], Any]) -> None:
        with quietly() as failed:
            function()
        if failed:
            self._failed = True
            with quietly():
                self._settle()
            raise InputError(self._unwritable(failed[0]))

    def restore(self, like: TrainState, *, step: int | None = None) -> Restored:
        """A checkpoint: of ``step``, or the last that is whole.

        ``like`` is the run's state at its start: its types, shapes and shardings are what is
        restored, on whatever mesh that is, and its frozen and reference parameters stay. Where the
        last is damaged, the one before it is taken, and the damaged one removed, for the run is
        going to write it again.

        Raises:
            InputError: where there is no such checkpoint, it is of another model, optimizer or
                reference, or all are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if step is not None and step in steps:
            steps = [step]
        elif step is not None or not steps:
            raise InputError(
                f"{self.folder}: no checkpoint{'' if step is None else f' of step {step}'}; "
                f"there are {sorted(self._manager.all_steps()) or 'none'}."
            )
        damaged: dict[int, str] = {}
        for number in steps:
            try:
                state, extra = self._read(number, like)
            except _Damaged as error:
                damaged[number] = f"the checkpoint of step {number} is damaged ({error})"
                continue
            for bad in damaged:
                self._manager.delete(bad)
            return Restored(state, extra["data"], extra["log"], tuple(damaged.values()))
        raise InputError(
            f"{self.folder}: {'; '.join(damaged.values())}; nothing is left to go on from: delete "
            "this folder to begin again."
        )

    def config(self, *, step: int | None = None) -> Any:
        """The configuration saved with a checkpoint (the last, by default).

        Raises:
            InputError: where the checkpoint is damaged.
        """
        step = self.latest if step is None else step
        try:
            return self._extra(step)["config"]
        except _Damaged as error:
            raise InputError(f"{self.folder}: step {step} is damaged ({error}).") from None

    def _extra(self, step: Any) -> dict[str, Any]:
        """What is beside a checkpoint's arrays."""
        items = ocp.args.Composite(**{_EXTRA: ocp.args.JsonRestore()})
        extra = dict(self._found(step, items, _EXTRA))
        if extra.pop("digest", None) != _digest(extra):
            raise _Damaged("its position and log are not what was written")
        return extra

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """One checkpoint, refused where it is another run's."""
        extra = self._extra(step)
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _saved(like)
        )
        self._check_shapes(step, extra["shapes"], _shapes(target))
        ours, theirs = fingerprint_text(like.fingerprint), extra["reference"]
        if ours != theirs:
            raise InputError(
                f"{self.folder}: step {step} was trained against the reference {theirs[:12]}, and "
                f"this run's is {ours[:12]}; give the model and seed of the saved run, or name "
                "another --output."
            )
        items = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(target)})
        found = dict(self._found(step, items, _STATE))
        if fingerprint_text(checksum(found)) != extra["checksum"]:
            raise _Damaged("its arrays are not what was written")
        key = jax.random.wrap_key_data(found.pop("key"), impl=jax.random.key_impl(like.key))
        return like._replace(**found, key=key), extra

    def close(self) -> None:
        """Finish writing and let go of the folder. Of a save that has failed nothing is said again.

        Raises:
            InputError: where it could not be written.
        """
        if self._failed:
            with quietly():
                self._manager.close()
        else:
            self._write(self._manager.close)

    def _found(self, step: Any, items: Any, name: str) -> Any:
        """A part of a checkpoint; whatever Orbax raises is damage, unless there is no memory."""
        found: list[Any] = []
        with quietly() as failed:
            found.append(dict(self._manager.restore(step, args=items)[name]))
        if not failed:
            return found[0]
        if "MemoryError" in failed[0] or "RESOURCE_EXHAUSTED" in failed[0]:
            raise MemoryError(failed[0][:500])
        raise _Damaged(failed[0][:160])

    def _check_shapes(self, step: int, have: dict[str, str], want: dict[str, str]) -> None:
        """Orbax would pad or cut an array of another shape, or fail in its own words."""
        for path in sorted(set(have) | set(want)):
            if have.get(path) != want.get(path):
                raise InputError(
                    f"{self.folder}: step {step} has {path} of shape {have.get(path)}, and this "
                    f"run's is {want.get(path)}; give the model and optimizer of the saved run, "
                    "or name another --output."
                )

    def _settle(self) -> None:
        """Wait for other writers, and clear away what could not be written."""
        # Orbax raises the first writer's error while the others still write: left running, they
        # would do so into a folder that has been opened again.
        end = time.monotonic() + _SETTLE
        for thread in set(threading.enumerate()) - self._before - {threading.current_thread()}:
            _wait_for(thread, end)
        if placement.leader():
            for half in self.folder.glob(f"{self._saving}.*tmp*"):
                shutil.rmtree(half, ignore_errors=True)

    def _unwritable(self, text: str) -> str:
        """What to tell of what could not be written."""
        whole = sorted(self._whole())
        kept = f"step {whole[-1]} is whole and kept" if whole else "no whole step is there yet"
        # TensorStore gives the system's own words last, behind paths and before its specification.
        system = re.search(r": ([^:\[]+) \[(?:os_error_code|tensorstore_spec)=", text)
        reason = system[1] if system else text[:200]
        return (
            f"{self.folder}: the checkpoint of step {self._saving} could not be written "
            f"({reason}); {kept}. Make room or name another --output, and start again."
        )

    def _whole(self) -> list[int]:
        return [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]


def _saved(state: TrainState) -> dict[str, Any]:
    """What is written: the carried part, the typed key as the numbers behind it."""
    return {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state,
        "key": jax.random.key_data(state.key),
        "fingerprint": state.fingerprint,
    }


def _shapes(tree: Any) -> dict[str, str]:
    """Shape and type of each array, by its path."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): f"{tuple(leaf.shape)} {leaf.dtype}" for path, leaf in paths}


def _digest(extra: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(extra, sort_keys=True).encode()).hexdigest()


def _wait_for(thread: threading.Thread, end: float) -> None:
    """Return when a thread has ended, or at a time of the monotonic clock."""
    while True:
        try:
            # Orbax's threads raise their error again from a join of their own.
            return threading.Thread.join(thread, max(0.0, end - time.monotonic()))
        except RuntimeError:  # It is being started, and can't be joined yet.
            if time.monotonic() > end:
                return None
            time.sleep(0.01)
        except AssertionError:  # Of a thread that it did not start Python 3.11 sees no end.
            return None


@contextmanager
def quietly() -> Iterator[list[str]]:
    """Keep what fails inside to one text, in the list.

    Orbax leaves the tasks and threads of a failed operation to themselves and to the garbage
    collector, and each prints the traceback of the one error, or that its event loop is closed.
    """
    failed: list[str] = []
    hooks = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = threading.excepthook = lambda _: None
    try:
        try:
            yield failed
        except Exception as error:
            text = " ".join(str(error).split())
            failed.append(text if text and type(error) is not MemoryError else repr(error))
        if failed:
            gc.collect()
    finally:
        sys.unraisablehook, threading.excepthook = hooks


def equal(first: TrainState, second: TrainState) -> bool:
    """Whether two states are the same to the bit, in all that is saved."""
    pairs = zip(jax.tree.leaves(_saved(first)), jax.tree.leaves(_saved(second)), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True) for a, b in pairs)
