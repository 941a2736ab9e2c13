"""Experiments at their smallest that no other file here runs."""

import json
import math

import jax
import pytest
from rich.console import Console

from experiments.benchmarks import grpo, preparing
from experiments.rules import run as rules
from tests.experiments import small

QUIET = Console(quiet=True)


@pytest.mark.slow
def test_every_rule_of_the_study_runs(tmp_path):
    path = rules.main(rules.Config(smoke=True, output=tmp_path), console=QUIET)
    found = {name: m["value"] for name, m in json.loads(path.read_text())["metrics"].items()}
    made = rules.learners(rules.Config())
    for name in made:
        assert found[f"rules/{name}/gap"] >= 0
        if name != "two draws":
            less = found[f"rules/{name}/gap"] - found["rules/two draws/gap"]
            assert math.isclose(found[f"rules/{name}/less two draws'"], less, abs_tol=1e-9)
    # The rules are not one rule by several names.
    assert len({found[f"rules/{name}/gap"] for name in made}) > len(made) // 2


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A folder with a model, and a text file of stories."""
    folder = tmp_path_factory.mktemp("small")
    small.story_model(folder)
    return folder / "model", folder / "stories.txt"


@pytest.mark.slow
def test_preparing(small_model, tmp_path):
    model, text = small_model
    config = preparing.Config(tokenizer=str(model), text=text, rows=1200, output=tmp_path)
    found = json.loads(preparing.main(config, console=QUIET).read_text())["metrics"]
    assert found["preparing/klrlhf data/rows"]["value"] == 1200
    assert found["preparing/klrlhf data/peak_mib"]["value"] > 50  # an interpreter with JAX


@pytest.mark.slow
def test_grpo_alone(small_model, tmp_path, monkeypatch):
    model, text = small_model
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # ours on one device is enough
    config = grpo.Config(
        model=model, prompts=text, output=tmp_path, batch=2, samples=2, new_tokens=3, steps=1,
        turns=2, micro_batches=(1,), trl_batches=(),
    )  # fmt: skip
    found = json.loads(grpo.main(config, console=QUIET).read_text())
    name = "ours, one device, 1 micro-batches"
    assert found["metrics"][f"grpo/{name}/tokens_per_second"]["n"] == 2
    assert found["config"]["machine"]["processor"]
