"""Runs that are finished: known before anything is loaded, left alone, and open to more steps.

``finished.json`` is the last thing that a run writes: its configuration and what it left where.
Whoever goes on with the run takes it away first. Nothing heavy is imported here.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_klrlhf.errors import InputError

MARK = "finished.json"
# Where a run is and on what it computes: of no interest to one that computes nothing.
_PLACE = {"output", "mesh", "processes"}
# How far a run goes: a finished one may be asked to go farther.
_FARTHER = {"steps", "epochs", "rounds", "best_of"}


def plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def read(folder: Path) -> dict[str, Any] | None:
    """The mark of a finished run; None where there is none, or what it is about has gone."""
    try:
        found = json.loads((folder / MARK).read_text())
        return found if (folder / found["left"]).is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mark(folder: Path, command: str, config: Any, *, left: str) -> None:
    """Say that the run is finished and that ``folder/left`` holds what it has made."""
    from jax_klrlhf.results import write_json

    write_json(folder / MARK, {"command": command, "config": plain(config), "left": left})


def unmark(folder: Path) -> None:
    """The run goes on."""
    (folder / MARK).unlink(missing_ok=True)


def note(folder: Path, arguments: Sequence[str]) -> None:
    """Keep the command line of a finished run beside its configuration, for :func:`again`."""
    from jax_klrlhf.results import write_json

    if (found := read(folder)) is not None:
        write_json(folder / MARK, {**found, "arguments": list(arguments)})


def again(command: str, arguments: Sequence[str]) -> str | None:
    """:func:`finished` of the very command line that finished the run, without reading it.

    None where it is another, or has a part in a file, which may have changed.
    """
    output = None
    for number, argument in enumerate(arguments):
        if argument.split("=")[0] == "--config":
            return None
        if argument == "--output":
            output = next(iter(arguments[number + 1 :]), None)
        elif argument.startswith("--output="):
            output = argument.removeprefix("--output=")
    found = None if output is None else read(Path(output))
    if found is None or found["command"] != command or found.get("arguments") != list(arguments):
        return None
    return _done(command, Path(output or ""), found)


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


def _more(command: str) -> str:
    return "ask for more --rounds" if command == "iterate" else "ask for more --steps or --epochs"


def _fixed(command: str, config: dict[str, Any]) -> set[str]:
    """Options that must stay the same all through a run."""
    if command == "iterate":
        from jax_klrlhf.programs.iterate_config import FREE
    else:
        from jax_klrlhf.programs.config import FREE
    return config.keys() - FREE
