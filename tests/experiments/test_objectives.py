"""The experiment on objectives: whole at its smallest, and its laws known to the library."""

import json

import numpy as np
from rich.console import Console

from experiments.objectives import run
from experiments.ridge import run as ridge


def test_it_runs_and_the_frontier_is_never_beaten(tmp_path):
    config = run.Config(smoke=True, output=tmp_path)
    path = run.main(config, console=Console(quiet=True))
    metrics = json.loads(path.read_text())["metrics"]
    assert (tmp_path / "objectives.png").stat().st_size > 10_000
    assert set(run.LAWS) == set(run.losses(config))
    below = [m["value"] for name, m in metrics.items() if name.endswith("below the frontier")]
    assert len(below) == len(run.LAWS)
    assert min(below) > -1e-5
    # Without a KL the policy sharpens beyond every other's.
    largest = {
        name.split("/")[1]: m["value"]
        for name, m in metrics.items()
        if name.endswith("largest probability")
    }
    assert max(largest, key=lambda name: largest[name]) != "RLOO"
    assert np.isfinite(list(largest.values())).all()


def test_the_ridge_is_an_axis(tmp_path):
    path = ridge.main(ridge.Config(smoke=True, output=tmp_path), console=Console(quiet=True))
    metrics = json.loads(path.read_text())["metrics"]
    gaps = {name: m["value"] for name, m in metrics.items() if name.endswith("/gap")}
    assert len(gaps) == 2 * 7
    assert min(gaps.values()) > 0
    # The ridge reaches the estimate: no method has one gap at both.
    for name in (name.split("/")[1] for name in gaps):
        assert gaps[f"ridge=0.1/{name}/gap"] != gaps[f"ridge=1/{name}/gap"]
