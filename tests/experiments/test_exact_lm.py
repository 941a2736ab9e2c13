"""The experiment's program at a toy size: what it writes, and what it refuses."""

import dataclasses
import json

import pytest
from rich.console import Console

from experiments.exact_lm import panels, run, world
from jax_klrlhf.errors import InputError

TINY = run.Config(
    seeds=2,
    panels=("comparison", "coverage"),
    world=world.Config(vocab=3, length=2, prompts=2, hidden=8, layers=1, sft_steps=5),
    sizes=panels.Config(
        labels_per_round=16, rounds=2, steps=3, coverage_rows=(50,), coverage_trials=3
    ),
)


@pytest.mark.slow
def test_a_run_leaves_results_and_a_figure(tmp_path):
    path = run.main(dataclasses.replace(TINY, output=tmp_path), console=Console(quiet=True))
    assert (tmp_path / "exact_lm.png").stat().st_size > 0
    found = json.loads(path.read_text())
    assert (found["name"], found["seeds"]) == ("exact_lm", [0, 1])
    gaps = {
        name.split("/")[1]: metric
        for name, metric in found["metrics"].items()
        if name.startswith("comparison/") and name.endswith("/gap")
    }
    methods = {name for name in gaps if " - " not in name}
    assert methods == {
        "offline",
        "online, two draws",
        "online, against pi0",
        "online, best and worst of 8",
        "online, uncertain enhancer",
        "hybrid, against pi0",
    }
    assert {f"{name} - offline" for name in methods - {"offline"}} == gaps.keys() - methods
    assert all(gaps[name]["value"] >= 0 and gaps[name]["n"] == 2 for name in methods)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"panels": ("frontier",)}, "choose from fixed_point"),
        ({"panels": ()}, "choose from fixed_point"),
        ({"seeds": 0}, "at least one seed"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_computed(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run.main(dataclasses.replace(TINY, output=tmp_path, **change))
