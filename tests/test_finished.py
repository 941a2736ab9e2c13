"""Runs that are finished: known by their mark alone, and by what it says of their files."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_klrlhf import cli, finished
from jax_klrlhf.errors import InputError
from jax_klrlhf.programs.config import DpoConfig
from jax_klrlhf.programs.generate_config import GenerateConfig
from jax_klrlhf.programs.iterate_config import FitConfig, IterateConfig
from tests.test_cli import HEAVY

ROOT = Path(__file__).resolve().parents[1]


def left_behind(folder: Path) -> None:
    """What a run leaves, as far as its mark is concerned."""
    (folder / "model").mkdir()
    (folder / "results.json").write_text('{"metrics": {"loss": 0.5}}\n')
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}\n')
    (folder / "model" / "model.safetensors").write_bytes(os.urandom(2**20 + 1))  # too much to hash


@pytest.fixture
def dpo(tmp_path):
    left_behind(tmp_path)
    config = DpoConfig(model="m", data="d", output=tmp_path, steps=4, kl_coef=0.2)
    finished.mark(tmp_path, "dpo", config, left="model")
    return config


@pytest.fixture
def iterate(tmp_path):
    left_behind(tmp_path)
    config = IterateConfig(model="m", reward="r", prompts="p", output=tmp_path, rounds=2)
    finished.mark(tmp_path, "iterate", config, left="model")
    return config


def test_it_is_said_where_the_result_is_and_what_to_do_next(dpo):
    said = finished.finished("dpo", dpo)
    assert said is not None
    assert "finished already, nothing to do" in said
    assert str(dpo.output / "model") in said
    assert "--steps or --epochs" in said


def test_another_place_of_the_folder_and_other_devices_change_nothing(dpo, tmp_path):
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    mesh = dataclasses.replace(dpo.mesh, fsdp=2)
    assert finished.finished("dpo", dataclasses.replace(dpo, output=moved, mesh=mesh)) is not None


def test_the_same_run_in_other_words_is_finished_and_loads_nothing(dpo, tmp_path):
    """Order and spelling differ, and some options come from a file."""
    (tmp_path / "some.json").write_text(
        json.dumps({"model": "m", "data": "d", "output": str(tmp_path), "kl_coef": 0.2})
    )
    told = "import sys; from jax_klrlhf import cli; code = cli.main(sys.argv[1:]);"
    told += f"print(code, [name for name in {HEAVY} if name in sys.modules])"
    long = ["--steps", "4", "--kl-coef", "0.20", "--output", str(tmp_path)]
    for words in (
        ["dpo", *long, "--data", "d", "--model", "m"],
        ["dpo", "--steps=4", "--config", str(tmp_path / "some.json")],
    ):
        done = subprocess.run(
            [sys.executable, "-c", told, *words], cwd=ROOT, capture_output=True, text=True
        )
        said, end = done.stdout.splitlines()
        assert "finished already" in said, done.stderr
        assert end == "0 []"


def test_more_steps_epochs_or_rounds_are_something_to_do(dpo):
    for more in ({"steps": 6}, {"steps": None, "epochs": 2.0}):
        assert finished.finished("dpo", dataclasses.replace(dpo, **more)) is None


def test_more_rounds_or_a_best_of_are_something_to_do(iterate):
    assert finished.finished("iterate", iterate) is not None
    for more in ({"rounds": 3}, {"best_of": 4}):
        assert finished.finished("iterate", dataclasses.replace(iterate, **more)) is None


def test_what_a_finished_run_does_not_read_is_refused_by_name(dpo):
    changed = dataclasses.replace(dpo, kl_samples=7)
    with pytest.raises(InputError, match=r"--kl-samples would be read by nothing; ask for more"):
        finished.finished("dpo", changed)


def test_another_run_is_not_it(dpo):
    # Refused by name when the folder is claimed, which knows what it was started with.
    assert finished.finished("dpo", dataclasses.replace(dpo, learning_rate=1e-3)) is None


def test_another_command_is_not_it(iterate):
    assert (
        finished.finished("iterate", dataclasses.replace(iterate, fit=FitConfig(steps=7))) is None
    )
    run = DpoConfig(model="m", data="d", output=iterate.output)
    assert finished.finished("dpo", run) is None


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def edit(path):
    path.write_bytes(path.read_bytes()[::-1])  # as long as before


DAMAGES = {
    "results cut": ("results.json", cut),
    "results edited": ("results.json", edit),
    "results gone": ("results.json", Path.unlink),
    "settings edited": ("model/config.json", edit),
    "weights cut": ("model/model.safetensors", cut),
    "weights gone": ("model/model.safetensors", Path.unlink),
    "mark cut": ("finished.json", cut),
    "mark empty": ("finished.json", lambda path: path.write_text("")),
    "mark a list": ("finished.json", lambda path: path.write_text("[]")),
    "mark nested": ("finished.json", lambda path: path.write_text("[" * 100_000)),
    "mark of another kind": (
        "finished.json",
        lambda path: path.write_text('{"left": "model", "files": ["results.json"]}'),
    ),
    "mark of no text": ("finished.json", lambda path: path.write_bytes(b"\xff")),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_result_is_not_finished(case, dpo):
    """The run goes on from its last checkpoint then, and writes again what it left."""
    name, damage = DAMAGES[case]
    assert finished.finished("dpo", dpo) is not None
    damage(dpo.output / name)
    assert finished.finished("dpo", dpo) is None


def test_what_a_user_puts_beside_the_result_is_no_damage(dpo):
    (dpo.output / "model" / "README.md").write_text("mine")
    assert finished.finished("dpo", dpo) is not None


def test_whoever_goes_on_takes_the_mark_away(dpo):
    finished.unmark(dpo.output)
    assert finished.finished("dpo", dpo) is None


# --- a signal outside of the training loop


def test_what_is_kept_is_said_of_every_command(tmp_path):
    """In the words that the command line says after "stopped by SIGTERM"."""
    run = DpoConfig(model="m", data="d", output=tmp_path)
    for command in cli.COMMANDS:
        config = run
        if command == "generate":
            config = GenerateConfig(models=("m",))
        if command == "iterate":
            config = IterateConfig(model="m", reward="r", prompts="p", output=tmp_path)
        said = finished.kept(command, config)
        if command == "label":
            assert f"every label that was confirmed is kept in {tmp_path}" in said
        elif not cli.COMMANDS[command].run:
            assert said == "before it was done; nothing was written: start again."
        elif command == "iterate":
            assert said == "before the first round; start again to begin."
        else:
            assert said == "before the first step; start again to begin."
    for step in ("2", "10", "4", "tmp"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    assert "after step 10, whose checkpoint is kept" in finished.kept("sft", run)
    for number, phase in enumerate(("before/round-000/judge", "rounds/round-001/sample")):
        path = (tmp_path / phase).with_suffix(".json")
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        os.utime(path, ns=(number, number))
    config = IterateConfig(model="m", reward="r", prompts="p", output=tmp_path)
    said = finished.kept("iterate", config)
    assert said == "after rounds/round-001/sample, which is kept: start again to go on from there."
