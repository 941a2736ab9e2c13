"""Runs that are finished: known before anything is loaded, left alone, and open to more steps.

``finished.json`` is the last thing that a run writes: its configuration and what it left where.
Whoever goes on with the run takes it away first. Nothing heavy is imported here.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jax_klrlhf.errors import InputError

MARK = "finished.json"
RESULTS = "results.json"
_SMALL = 2**20  # bytes of a file that is hashed
# Where a run is and on what it computes: of no interest to one that computes nothing.
_PLACE = {"output", "mesh", "processes"}
# How far a run goes: a finished one may be asked to go farther.
_FARTHER = {"steps", "epochs", "rounds", "best_of"}


def plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def read(folder: Path) -> dict[str, Any] | None:
    """The mark of a finished run; None where there is none, or what it left is not as it was."""
    try:
        found = json.loads((folder / MARK).read_text())
        whole = (folder / found["left"]).is_dir() and found["files"] == _files(
            folder, found["files"]
        )
        return found if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def mark(folder: Path, command: str, config: Any, *, left: str) -> None:
    """Say that the run is finished and that ``folder/left`` holds what it has made."""
    from jax_klrlhf.results import write_json

    made = [path for path in (folder / left).rglob("*") if path.is_file()]
    names = [str(path.relative_to(folder)) for path in (folder / RESULTS, *sorted(made))]
    found = {"command": command, "config": plain(config), "left": left}
    write_json(folder / MARK, {**found, "files": _files(folder, names)})


def _files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """What tells a file that was cut or edited: a hash of what is small, the size of weights."""
    found = {}
    for name in names:
        size = (folder / name).stat().st_size
        found[name] = f"{size} bytes"
        if size < _SMALL:
            found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return found


def unmark(folder: Path) -> None:
    """The run goes on."""
    (folder / MARK).unlink(missing_ok=True)


def finished(command: str, config: Any) -> str | None:
    """What to say of a run that is finished already; None where there is something to do.

    Raises:
        InputError: where only options are changed that a finished run does not read.
    """
    folder = Path(config.output)
    found = read(folder)
    if found is None or found["command"] != command:
        return None
    ours, theirs = plain(config), found["config"]
    changed = {key for key in ours if ours[key] != theirs.get(key)} - _PLACE
    if changed & _FARTHER or changed & _fixed(command, ours):
        return None  # More to do, or to be refused by name when the folder is claimed.
    if changed:
        name = sorted(changed)[0]
        raise InputError(
            f"{folder}: this run is finished, so that --{name.replace('_', '-')} would be read by "
            f"nothing; {_more(command)}, or name another --output."
        )
    return _done(command, folder, found)


def _done(command: str, folder: Path, found: dict[str, Any]) -> str:
    return f"{folder}: finished already, nothing to do. {next_step(command, folder, found['left'])}"


def next_step(command: str, folder: Path, left: str) -> str:
    """Where the result is, and what can be done with it."""
    path = folder / left
    if command == "reward":
        use = f"use it: klrlhf iterate --reward {path} ..."
    elif left == "adapter":
        use = "an adapter of the model it was trained on, as peft reads it"
    else:
        use = f"try it: klrlhf generate --models {path} --prompts PROMPTS.txt"
    return f"The result is in {path}; {use}; {_more(command)} to go on."


def kept(command: str, config: Any) -> str:
    """What a program leaves that a signal ended before it was done, and how to go on."""
    output = getattr(config, "output", None)
    if command == "generate" and output is not None:
        return f"before it was done; the answers until then are in {output}."
    if command == "label":
        return f"before it was done; every label that was confirmed is kept in {output}."
    if command in ("data", "eval", "generate", "plan", "report"):
        return "before it was done; nothing was written: start again."
    folder = Path(str(output))
    if command == "iterate":
        phases = [*folder.glob("before/round-*/*.json"), *folder.glob("rounds/round-*/*.json")]
        if not phases:
            return "before the first round; start again to begin."
        last = max(phases, key=lambda path: (path.stat().st_mtime_ns, path.name))
        where = last.relative_to(folder).with_suffix("")
        return f"after {where}, which is kept: start again to go on from there."
    steps = [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()]
    if not steps:
        return "before the first step; start again to begin."
    return f"after step {max(steps)}, whose checkpoint is kept: start again to go on from there."


def _more(command: str) -> str:
    return "ask for more --rounds" if command == "iterate" else "ask for more --steps or --epochs"


def _fixed(command: str, config: dict[str, Any]) -> set[str]:
    """Options that must stay the same all through a run."""
    if command == "iterate":
        from jax_klrlhf.programs.iterate_config import FREE
    else:
        from jax_klrlhf.programs.config import FREE
    return config.keys() - FREE
