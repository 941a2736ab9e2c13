"""SIGINT and SIGTERM outside of the training loop: one line that says what is kept."""

import json
import shutil
import signal

import numpy as np
import pytest

from jax_klrlhf import cli, models
from jax_klrlhf.data import prepare
from jax_klrlhf.label import program as label
from jax_klrlhf.plan import report
from jax_klrlhf.report import program as page
from tests.test_cli import options, pairs, quick_compilation, tiny  # noqa: F401

NAMES = ("SIGINT", "SIGTERM")


def raising(name):
    """In the place of a function: the signal comes while it is at work."""

    def came(*arguments, **named):
        signal.raise_signal(getattr(signal, name))
        raise AssertionError("the signal was ignored")

    return came


@pytest.fixture(autouse=True)
def interruptible():
    """As at a terminal: what is started in the background of a script ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def arguments(tiny, pairs, tmp_path):  # noqa: F811
    """Of every command."""
    heaps = tmp_path / "heaps"
    heaps.mkdir()
    for name in ("positive", "negative"):
        (heaps / f"{name}.txt").write_text(f"{name}\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\na dog\n")
    output = tmp_path / "out"
    run = options(tiny, pairs, output)
    asked = ["--prompts", str(prompts), "--max-prompt-length", "8", "--max-response-length", "8"]
    given = {
        "data": ["--data", str(pairs), "--tokenizer", str(tiny), "--output", str(output)],
        "eval": ["--model", str(tiny), "--against", str(tiny), "--reward", str(heaps), *asked],
        "generate": ["--models", str(tiny), "--output", str(output), *asked],
        "iterate": ["--model", str(tiny), "--reward", str(heaps), "--output", str(output), *asked],
        "label": ["--output", str(output)],
        "report": [str(output)],
        "plan": ["--model", str(tiny), "--topology", "cpu:8", "--prompt", "8", "--response", "8"],
    }
    given["iterate"] += ["--held-out", "0"]
    return {name: [name, *given.get(name, run)] for name in cli.COMMANDS}, output


@pytest.mark.parametrize("by", NAMES)
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_before_the_first_step_it_is_said_in_one_line(name, by, arguments, monkeypatch, capsys):
    given, output = arguments
    for module, function in (
        (models, "load"),
        (prepare, "build"),
        (report, "compile_program"),
        (label, "serve"),
        (page, "check"),
    ):
        monkeypatch.setattr(module, function, raising(by))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(given[name]) == 3
    assert signal.getsignal(signal.SIGTERM) == before
    (line,) = capsys.readouterr().err.splitlines()
    what = {"iterate": "before the first round; start again to begin."}
    if not cli.COMMANDS[name].run:
        what[name] = "before it was done; nothing was written: start again."
        assert not output.exists() or name in ("generate", "label")
    what["generate"] = f"before it was done; the answers until then are in {output}."
    what["label"] = f"before it was done; every label that was confirmed is kept in {output}."
    usual = "before the first step; start again to begin."
    assert line == f"klrlhf: stopped by {by} {what.get(name, usual)}"


@pytest.mark.parametrize("by", NAMES)
def test_while_the_options_are_read_nothing_has_begun(by, arguments, monkeypatch, capsys):
    given, output = arguments
    monkeypatch.setattr(cli, "parse", raising(by))
    assert cli.main(given["dpo"]) == 3
    said = capsys.readouterr().err
    assert said == f"klrlhf: stopped by {by} before it began; nothing was written.\n"
    assert not output.exists()


@pytest.mark.parametrize("by", NAMES)
def test_after_a_step_its_checkpoint_is_named_and_kept(by, arguments, monkeypatch, capsys):
    """Between loading and the loop, of a run that had come to step 12 before."""
    given, output = arguments
    monkeypatch.setattr(models, "load", raising(by))
    assert cli.main(given["reward"]) == 3
    capsys.readouterr()
    kept = output / "checkpoints" / "12" / "state"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"whole")
    assert cli.main(given["reward"]) == 3
    said = capsys.readouterr().err
    assert said == (
        f"klrlhf: stopped by {by} after step 12, whose checkpoint is kept: start again to go on "
        "from there.\n"
    )
    assert kept.read_bytes() == b"whole"


@pytest.mark.parametrize("by", NAMES)
def test_preparation_that_was_stopped_leaves_nothing(by, arguments, monkeypatch, capsys):
    """In the middle of its records, where a folder has been begun beside the one asked for."""
    given, output = arguments
    monkeypatch.setattr(np, "savez", raising(by))
    there = set(output.parent.iterdir())
    assert cli.main(given["data"]) == 3
    assert "nothing was written" in capsys.readouterr().err
    assert set(output.parent.iterdir()) == there
    monkeypatch.undo()
    assert cli.main(given["data"]) == 0
    assert json.loads((output / "prepared.json").read_text())["examples"] == 60
    shutil.rmtree(output)
