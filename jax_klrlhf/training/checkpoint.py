"""Checkpoints: a run killed at any moment goes on to the same bits.

A checkpoint holds the carried state (step, trained parameters, optimizer, key, fingerprint of pi0),
the position in the data and the configuration. Orbax writes it asynchronously under a temporary
name and renames it when it is whole, so a reader finds the last whole one whatever happened since;
what a killed run left half-written is removed on opening.

Frozen parameters and the reference are not saved: they are read from where they came from, and the
fingerprint says whether they are the same.
"""

import logging
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_klrlhf.errors import InputError
from jax_klrlhf.results import output_folder
from jax_klrlhf.training.state import TrainState, fingerprint_text

_STATE, _EXTRA = "state", "extra"
_SETTLE = 30.0  # seconds that the writers of a failed save are waited for


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
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._before: set[threading.Thread] = set()
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
            ),
            item_handlers={
                _STATE: ocp.StandardCheckpointHandler(),
                _EXTRA: ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def latest(self) -> int | None:
        """Step of the last whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, *, data: Any, config: Any) -> None:
        """Begin to save ``state`` under its own step; a step already saved is left as it is.

        Returns when the arrays have been copied; writing goes on beside the run. ``data`` (the
        position) and ``config`` are anything JSON holds.

        Raises:
            InputError: where this or the previous save could not be written.
        """
        step = int(state.step)
        self.wait()
        if step in self._manager.all_steps():
            return
        self._before, self._saving = set(threading.enumerate()), step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        _STATE: ocp.args.StandardSave(_saved(state)),
                        _EXTRA: ocp.args.JsonSave({"data": data, "config": config}),
                    }
                ),
            )
        except Exception as error:
            raise self._unwritable(error) from error

    def wait(self) -> None:
        """Return when everything begun is on disk.

        Raises:
            InputError: where it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritable(error) from error

    def restore(self, like: TrainState, *, step: int | None = None) -> tuple[TrainState, Any]:
        """The state of a checkpoint (the last, by default), and the data position.

        ``like`` is the run's state at its start: its types, shapes and shardings are what is
        restored, on whatever mesh that is, and its frozen and reference parameters stay.

        Raises:
            InputError: where there is no such checkpoint, or it is of another model, optimizer or
                reference.
        """
        step = self.latest if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise InputError(
                f"{self.folder}: no checkpoint{'' if step is None else f' of step {step}'}; "
                f"there are {sorted(self._manager.all_steps()) or 'none'}."
            )
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _saved(like)
        )
        self._check_shapes(step, target)
        items = ocp.args.Composite(
            **{_STATE: ocp.args.StandardRestore(target), _EXTRA: ocp.args.JsonRestore()}
        )
        restored = self._manager.restore(step, args=items)
        found, extra = restored[_STATE], restored[_EXTRA]
        ours, theirs = (fingerprint_text(x) for x in (like.fingerprint, found["fingerprint"]))
        if ours != theirs:
            raise InputError(
                f"{self.folder}: step {step} was trained against the reference {theirs[:12]}, and "
                f"this run's is {ours[:12]}; give the model and seed of the saved run, or name "
                "another --output."
            )
        key = jax.random.wrap_key_data(found.pop("key"), impl=jax.random.key_impl(like.key))
        return like._replace(**found, key=key), extra["data"]

    def config(self, *, step: int | None = None) -> Any:
        """The configuration saved with a checkpoint (the last, by default)."""
        step = self.latest if step is None else step
        items = ocp.args.Composite(**{_EXTRA: ocp.args.JsonRestore()})
        return self._manager.restore(step, args=items)[_EXTRA]["config"]

    def close(self) -> None:
        """Finish writing and let go of the folder."""
        self.wait()
        self._manager.close()

    def _check_shapes(self, step: int, target: Any) -> None:
        """Orbax would pad or cut an array of another shape, or fail in its own words."""
        saved = self._manager.item_metadata(step)[_STATE]
        tree = getattr(saved, "tree", saved)
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
        have = {
            name(path): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                tree, is_leaf=lambda leaf: hasattr(leaf, "shape")
            )
        }
        want = {
            name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(target)
        }
        for path in sorted(set(have) | set(want)):
            if have.get(path) != want.get(path):
                raise InputError(
                    f"{self.folder}: step {step} has {path} of shape {have.get(path)}, and this "
                    f"run's is {want.get(path)}; give the model and optimizer of the saved run, "
                    "or name another --output."
                )

    def _unwritable(self, error: Exception) -> InputError:
        """Clear away what could not be written; what to tell of it."""
        # Orbax raises the first writer's error while the others still write: left running, they
        # would do so into a folder that has been opened again.
        end = time.monotonic() + _SETTLE
        for thread in set(threading.enumerate()) - self._before - {threading.current_thread()}:
            # Orbax's threads raise their error again from a join of their own.
            threading.Thread.join(thread, max(0.0, end - time.monotonic()))
        if jax.process_index() == 0:
            for half in self.folder.glob(f"{self._saving}.*tmp*"):
                shutil.rmtree(half, ignore_errors=True)
        whole = sorted(self._whole())
        kept = f"step {whole[-1]} is whole and kept" if whole else "no whole step is there yet"
        text = " ".join(str(error).split())
        # TensorStore gives the system's own words last, behind paths and before its specification.
        system = re.search(r": ([^:\[]+) \[(?:os_error_code|tensorstore_spec)=", text)
        reason = system[1] if system else text[:200]
        return InputError(
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


def equal(first: TrainState, second: TrainState) -> bool:
    """Whether two states are the same to the bit, in all that is saved."""
    pairs = zip(jax.tree.leaves(_saved(first)), jax.tree.leaves(_saved(second)), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True) for a, b in pairs)
