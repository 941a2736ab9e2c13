"""``klrlhf <command>``: options from the shell or a file, to a configuration, to a program.

``--config FILE`` reads a configuration (JSON or YAML, such as the ``config.json`` that every run
leaves); options beside it change single values. Bad input is one line on standard error and exit
status 2; a run that was stopped is one line and status 3.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_klrlhf.errors import InputError


class Command(NamedTuple):
    """Where a command lives: imported only when it is the one that was asked for."""

    module: str
    config: str
    """Name of its configuration, a frozen dataclass."""
    function: str
    """Name of its program, a function of the configuration."""
    summary: str


COMMANDS = {
    "data": Command("jax_klrlhf.data.statistics", "DataConfig", "main", "prepare and describe"),
    "dpo": Command("jax_klrlhf.programs", "DpoConfig", "dpo", "train a policy on preferences"),
    "iterate": Command(
        "jax_klrlhf.programs.iterate", "IterateConfig", "iterate", "rounds of sample, compare, fit"
    ),
    "plan": Command("jax_klrlhf.plan", "PlanConfig", "main", "will it fit on a TPU slice?"),
    "reward": Command("jax_klrlhf.programs", "RewardConfig", "reward", "train a reward model"),
    "sft": Command("jax_klrlhf.programs", "SftConfig", "sft", "train on demonstrations"),
}


def usage() -> str:
    """The commands, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: klrlhf <command> [options]", *lines, "options: klrlhf <command> --help"]
    )


def parse(name: str, arguments: Sequence[str]) -> tuple[Any, Any]:
    """The program of a command and its configuration.

    Raises:
        InputError: where a configuration file is wrong.
        SystemExit: from the parser, on bad options and on ``--help``.
    """
    import tyro

    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    kind = getattr(module, command.config)
    path, rest = _take_config(list(arguments))
    options: dict[str, Any] = {"prog": f"klrlhf {name}", "args": rest}
    if path is not None:
        from jax_klrlhf.programs.config import read

        options["default"] = read(path, kind, command=name)
    return getattr(module, command.function), tyro.cli(kind, **options)


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """``--config FILE`` out of the arguments."""
    for number, argument in enumerate(arguments):
        if argument == "--config":
            if number + 1 == len(arguments):
                raise InputError("--config needs a file.")
            return Path(arguments[number + 1]), arguments[:number] + arguments[number + 2 :]
        if argument.startswith("--config="):
            rest = arguments[:number] + arguments[number + 1 :]
            return Path(argument.removeprefix("--config=")), rest
    return None, arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    name, rest = given[0], given[1:]
    try:
        if name not in COMMANDS:
            raise InputError(f"no command {name!r}; there are {', '.join(COMMANDS)}.")
        program, config = parse(name, rest)
        program(config)
    except InputError as error:
        print(f"klrlhf: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "Stopped":
            raise
        print(f"klrlhf: stopped: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
