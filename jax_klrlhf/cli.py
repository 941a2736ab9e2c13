"""``klrlhf <command>``: options from the shell or a file, to a configuration, to a program.

``--config FILE`` reads a configuration (JSON or YAML, such as the ``config.json`` that every run
leaves); options beside it change single values. Bad input is one line on standard error and exit
status 2; a run that was stopped is one line and status 3; a run that is finished is left alone.
"""

import importlib
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_klrlhf import __version__, finished
from jax_klrlhf.errors import InputError, meant


class Command(NamedTuple):
    """Where a command lives: what it computes with is imported when it is to compute."""

    config: str
    """``module:Name`` of its configuration, a frozen dataclass; nothing heavy is imported there."""
    function: str
    """``module:name`` of its program, a function of the configuration."""
    summary: str
    run: bool = False
    """It leaves a run's folder, which may be finished."""


def _program(name: str, config: str, summary: str, *, run: bool = False) -> Command:
    place = "jax_klrlhf.programs"
    return Command(
        f"{place}.{name}_config:{config}",
        f"{place}.{name}:{name}",
        summary,
        run=run,
    )


def _training(name: str, config: str, summary: str) -> Command:
    place = "jax_klrlhf.programs"
    return Command(f"{place}.config:{config}", f"{place}.train:{name}", summary, run=True)


COMMANDS = {
    "data": _program("data", "DataConfig", "prepare and describe"),
    "dpo": _training("dpo", "DpoConfig", "train a policy on preferences"),
    "eval": _program("evaluate", "EvalConfig", "a policy against another, by a judge"),
    "generate": _program("generate", "GenerateConfig", "answers of policies; --chat to talk"),
    "iterate": _program("iterate", "IterateConfig", "rounds of sample, compare, fit", run=True),
    "label": Command(
        "jax_klrlhf.programs.label_config:LabelConfig",
        "jax_klrlhf.label.program:label",
        "a page on which people compare answers",
    ),
    "plan": Command(
        "jax_klrlhf.programs.plan_config:PlanConfig",
        "jax_klrlhf.plan:main",
        "will it fit on a TPU slice?",
    ),
    "report": Command(
        "jax_klrlhf.programs.report_config:ReportConfig",
        "jax_klrlhf.report.program:report",
        "a run, or answers, as a page",
    ),
    "reward": _training("reward", "RewardConfig", "train a reward model"),
    "sft": _training("sft", "SftConfig", "train on demonstrations"),
}
_CONFIG = """--config FILE reads these options from JSON or YAML, such as the config.json that a run
leaves; options beside it change single values."""
# What the library says of its own arguments, in the words of the command line.
_WORDS = {
    "name yours with columns=": "name yours with --columns.prompt, --columns.chosen, ...",
    "(control_tokens)": "(--control-tokens)",
    "; test_fraction ": "; --test-fraction ",
    "with test_fraction for": "with --test-fraction for",
}


def usage() -> str:
    """The commands, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: klrlhf <command> [options]",
            *lines,
            "options: klrlhf <command> --help; from a file: --config FILE; klrlhf --version",
        ]
    )


def parse(name: str, arguments: Sequence[str]) -> Any:
    """The configuration of a command, from its arguments.

    Raises:
        InputError: where a configuration file is wrong.
        SystemExit: from the parser, on bad options and on ``--help``.
    """
    import tyro

    from jax_klrlhf.programs import options as declared

    kind = _found(COMMANDS[name].config)
    path, rest = _take_config(list(arguments))
    options: dict[str, Any] = {
        "prog": f"klrlhf {name}",
        "args": rest,
        "description": f"{inspect.getdoc(kind)}\n\n{_CONFIG}",
        "registry": declared.flat(),
    }
    if path is not None:
        from jax_klrlhf.programs.config import read

        options["default"] = read(path, kind, command=name)
    try:
        return tyro.cli(kind, **options)
    except declared.Unread as error:
        raise InputError(str(error)) from None


def program(name: str) -> Callable[[Any], Any]:
    """The program of a command, with all that it imports."""
    return _found(COMMANDS[name].function)


def _found(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


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
    try:
        try:
            return _main(given)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone, as in `| head`. What is flushed at exit has to go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    if given == ["--version"]:
        print(f"klrlhf {__version__}")
        return 0
    name, rest = given[0], given[1:]
    before = config = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, _terminated)
    try:
        if name not in COMMANDS:
            raise InputError(
                f"no command {name!r}{meant(name, COMMANDS)}; there are {', '.join(COMMANDS)}."
            )
        config = parse(name, rest)
        if COMMANDS[name].run and (said := finished.finished(name, config)) is not None:
            print(said)
            return 0
        program(name)(config)
    except InputError as error:
        text = " ".join(str(error).split())
        for ours, theirs in _WORDS.items():
            text = text.replace(ours, theirs)
        print(f"klrlhf: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        by, kept = str(error) or "SIGINT", "before it began; nothing was written."
        if config is not None:
            kept = finished.kept(name, config)
        print(f"klrlhf: stopped by {by} {kept}", file=sys.stderr)
        return 3
    except RuntimeError as error:
        if type(error).__name__ != "Stopped":
            raise
        print(f"klrlhf: stopped: {error}", file=sys.stderr)
        return 3
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return 0


def _terminated(number: int, frame: Any) -> None:
    """SIGTERM outside of the training loop, which has its own way of ending."""
    del frame
    raise KeyboardInterrupt(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
