"""The folder of a run: held by one program, claimed for one configuration, finished in the end.

It holds ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``data/`` (the prepared data set),
``model/`` (the result, as Hugging Face would have it) and ``results.json``; ``rounds/`` in place of
``checkpoints/`` where it is one of ``klrlhf iterate``. Started again with the same configuration, a
run goes on from where it was.
"""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from jax_klrlhf import defaults, finished, folders, placement
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import LanguageModel
from jax_klrlhf.programs.config import FREE, TrainingConfig, check
from jax_klrlhf.results import Metric, output_folder, read_json, write_json, write_results
from jax_klrlhf.training import compiler, metrics, processes
from jax_klrlhf.training import mesh as meshes

T = TypeVar("T")


class Run(NamedTuple):
    """A run that has begun: its configuration, folder, devices and terminal."""

    config: Any
    name: str
    folder: Path
    mesh: Mesh | None
    console: Console

    @property
    def compute_dtype(self) -> Any:
        """What parameters are cast to in a step, or None."""
        return jnp.bfloat16 if self.config.dtype == "bfloat16" else None


def begin(config: TrainingConfig, name: str, console: Console | None) -> Run:
    """Join the processes, lay out the mesh, and claim the folder.

    Raises:
        InputError: where the folder cannot be written, or holds a run of another configuration.
    """
    check(config)
    mesh = devices(config)
    folder = output_folder(config.output)
    hold(folder)
    begun = any((folder / "checkpoints").glob("[0-9]*"))
    more = {"steps", "epochs"} if finished.read(folder) is not None else set()
    claim(folder, name, config, free=FREE | more, begun=begun)
    return Run(config, name, folder, mesh, console or Console(quiet=not placement.leader()))


def devices(config: Any) -> Mesh | None:
    """Join the processes of a configuration; the mesh over all devices, None for one.

    Raises:
        InputError: where the mesh does not fit the devices.
    """
    processes.join(**dataclasses.asdict(config.processes))
    compiler.remember(config.compilation_cache)
    return mesh_of(config.mesh)


def mesh_of(sizes: Any) -> Mesh | None:
    """The mesh over all devices, None for one.

    Raises:
        InputError: where the sizes do not fit the devices.
    """
    if jax.device_count() == 1:
        return None
    try:
        return meshes.make(**dataclasses.asdict(sizes))
    except ValueError as error:
        raise InputError(str(error)) from None


_held: ContextVar[ExitStack | None] = ContextVar("held", default=None)


def alone(program: Callable[..., T]) -> Callable[..., T]:
    """A program of a configuration that has its folder to itself: it lets go of it at its end."""

    @wraps(program)
    def call(config: Any, *, console: Console | None = None) -> T:
        with ExitStack() as stack:
            token = _held.set(stack)
            try:
                return program(config, console=console)
            except Exception as error:
                if processes.lost(error):
                    processes.leave(error)
                raise
            finally:
                _held.reset(token)

    return call


def hold(folder: Path) -> None:
    """Take a run's folder, to the end of the program, and sweep up what killed ones left in it.

    Raises:
        InputError: naming the program that has it.
    """
    stack = _held.get()
    assert stack is not None, "a program that holds a folder is decorated with `alone`"

    def take() -> None:
        stack.enter_context(folders.locked(folder))
        for name in ("model", "adapter"):
            folders.sweep(folder / name, alone=True)

    placement.lead(take)


def claim(folder: Path, command: str, config: Any, *, free: set[str], begun: bool) -> None:
    """Write the configuration; of a run that has ``begun``, see first that it is the same.

    Args:
        folder: of the run.
        command: the program's name.
        config: its configuration.
        free: options that may change between a run and its continuation.
        begun: the folder holds something of the run that another configuration would spoil.

    Raises:
        InputError: naming the option that is another, or what is wrong with ``config.json``.
    """
    path = folder / "config.json"
    ours = {"command": command, **finished.plain(config)}
    if begun and path.exists():
        theirs = read_json(path, remedy="name another --output")
        for key in sorted(ours.keys() - free):
            if theirs.get(key) != ours[key]:
                raise InputError(
                    f"{path}: this run was started with {key} {theirs.get(key)!r}, now it is "
                    f"{ours[key]!r}; give the same to go on with it, or another --output."
                )
    placement.lead(lambda: write_json(path, ours))


def report(run: Run, found: metrics.Metrics, seconds: float) -> None:
    """Write ``results.json``: metrics named ``train/<method>/...`` and ``eval/<method>/...``."""
    method = getattr(run.config, "objective", run.name)
    named: dict[str, Metric] = {}
    for name, metric in found.items():
        panel, rest = ("eval", name[5:]) if name.startswith("eval/") else ("train", name)
        named[f"{panel}/{method}/{rest}"] = metric
    if placement.leader():
        write_results(
            run.folder,
            name=run.name,
            config=finished.plain(run.config),
            seeds=[run.config.seed],
            seconds=seconds,
            metrics=named,
        )


def chunk(run: Run, model: LanguageModel) -> int:
    """Tokens projected on the vocabulary at one time: the configuration's, or the default."""
    parts = placement.parts(run.mesh)
    return run.config.chunk or defaults.chunk(model.vocab_size, parts=parts)


def optional(config: Any, *, frozen: bool = False) -> dict[str, Any]:
    """Loading options of a configuration; ``frozen`` for an adapter's base."""
    dtype = jnp.dtype(config.dtype)
    stored = defaults.base_dtype(dtype) if frozen else jnp.float32
    options: dict[str, Any] = {"param_dtype": stored, "dtype": dtype}
    return options | ({} if config.remat is None else {"remat": config.remat})


def close(run: Run, left: str) -> None:
    """The run is finished: say so, where ``left`` in its folder is, and what to do next."""
    placement.lead(lambda: finished.mark(run.folder, run.name, run.config, left=left))
    said = finished.next_step(run.name, run.folder, left)
    run.console.print(said, markup=False, highlight=False, soft_wrap=True)
