"""The reward-side experiments at toy size: what they write, and what must hold in it."""

import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console

from experiments.atlas import policy
from experiments.atlas import run as atlas
from experiments.goodhart import run as goodhart
from experiments.pluralism import run as pluralism
from jax_klrlhf import core
from jax_klrlhf.errors import InputError
from jax_klrlhf.results import Metric

QUIET = Console(quiet=True)


def metrics_of(path):
    return json.loads(path.read_text())["metrics"]


@pytest.mark.slow
def test_goodhart(tmp_path):
    found = metrics_of(goodhart.main(goodhart.Config(output=tmp_path, smoke=True), console=QUIET))
    assert (tmp_path / "goodhart.png").is_file()
    assert all(np.isfinite(m["value"]) for m in found.values())
    for regime in goodhart.worlds.REGIMES:
        # At equal KL nothing beats gold itself on gold, in any world.
        for name in goodhart.RULES:
            at = f"{regime}, KL 1"
            best = found[f"{at}/gold itself/gold"]["value"]
            assert found[f"{at}/{name}/gold"]["value"] <= best + 1e-4
    with pytest.raises(InputError, match="at least two worlds"):
        goodhart.main(goodhart.Config(output=tmp_path, seeds=1), console=QUIET)


def test_the_verdict_follows_from_the_interval():
    assert atlas.verdict(Metric(1.0, 0.4, 9)) == "held"
    assert atlas.verdict(Metric(1.0, 0.6, 9)) == "undecided"
    assert atlas.verdict(Metric(-1.0, 0.4, 9)) == "not held"
    assert atlas.verdict(Metric(0.0, 0.0, 9)) == "undecided"


def test_the_atlas_writes_what_it_measured_and_reads_other_results(tmp_path):
    source = tmp_path / "results.json"
    names = [row.source[1] for row in atlas.READ]
    values = {name: {"value": 1.0, "stderr": 0.1, "n": 4} for name in names}
    source.write_text(json.dumps({"metrics": values}))
    config = atlas.Config(output=tmp_path / "out", smoke=True, goodhart=source)
    found = metrics_of(atlas.main(config, console=QUIET))
    page = (tmp_path / "out" / "atlas.md").read_text().splitlines()
    assert len(page) == 2 + 2 + len(names)
    assert page[-1].count("| held |") == 1
    asking = next(r for r in atlas.ROWS if r.function == "posterior.deferral")
    assert found[f"{atlas.key_of(asking)}/effect"]["value"] > 0
    assert found[f"{atlas.key_of(asking)}/control"]["value"] == 0
    source.write_text(json.dumps({"metrics": {}}))
    with pytest.raises(InputError, match="no metric"):
        atlas.main(config, console=QUIET)


@pytest.mark.slow
def test_pluralism(data_dir, tmp_path):
    config = pluralism.Config(choices_dir=data_dir / "choices", output=tmp_path, smoke=True)
    found = metrics_of(pluralism.main(config, console=QUIET))
    assert (tmp_path / "pluralism.png").is_file()
    for count in (0, 4):
        for method in pluralism.METHODS:
            at = f"train_tickets, {count} labels/{method}"
            assert -3 < found[f"{at}/log likelihood"]["value"] < 0
            worst = found[f"{at}/worst tenth"]["value"]
            assert worst < found[f"{at}/log likelihood"]["value"]
            assert 0 <= found[f"{at}/calibration"]["value"] < 0.5
    # Nobody's own labels can matter to the one reward.
    same = [found[f"train_tickets, {m} labels/one reward/log likelihood"]["value"] for m in (0, 4)]
    assert same[0] == same[1]
    with pytest.raises(InputError, match="no such folder"):
        pluralism.main(dataclasses.replace(config, choices_dir=tmp_path / "none"), console=QUIET)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ("the published KL term", "not held"),
        ("regression on rewards and leave-one-out", "held"),
        ("the last iterate is the equilibrium", "not held"),
    ],
)
def test_what_the_policy_side_claims_and_its_control(claim, said):
    """Two of the rows that do not hold, with controls that do; and one the other way round."""
    (row,) = [atlas.Row(**row) for row in policy.ROWS if row["claim"].startswith(claim)]
    found = atlas.measured(row, atlas.Config(worlds=4), {})
    assert atlas.verdict(found["effect"]) == said
    assert atlas.verdict(found["control"]) == ("held" if said == "not held" else "not held")


def test_rows_name_functions_of_the_library():
    for row in policy.ROWS:
        module, _, name = row["function"].partition(".")
        assert callable(getattr(getattr(core, module), name)), row["function"]
