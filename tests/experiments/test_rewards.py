"""The reward-side experiments at toy size: what they write, and what must hold in it."""

import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from experiments.atlas import page, policy, rows
from experiments.atlas import run as atlas
from experiments.benchmarks import rewards as benchmark
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
    for regime in goodhart.worlds.REGIMES + goodhart.worlds.LANGUAGE:
        # At equal KL nothing beats gold itself on gold, in any world.
        for name in goodhart.RULES:
            at = f"{regime}, KL 1"
            best = found[f"{at}/gold itself/gold"]["value"]
            assert found[f"{at}/{name}/gold"]["value"] <= best + 1e-4
    with pytest.raises(InputError, match="at least two worlds"):
        goodhart.main(goodhart.Config(output=tmp_path, seeds=1), console=QUIET)


def effect(value, stderr=0.1):
    return Metric(value, stderr, 48)


def test_the_verdict_follows_from_the_intervals_of_all_settings():
    up, down, nothing = effect(1.0), effect(-1.0), effect(0.05)
    verdict = lambda *effects: rows.tally(effects).verdict  # noqa: E731
    assert verdict(up, up) == "held"
    assert verdict(up, nothing) == verdict(up, down) == "in part"
    assert verdict(down, nothing) == "not held"
    assert verdict(nothing, nothing) == verdict(Metric(0.0, 0.0, 48)) == "undecided"
    # What float32 leaves of equal numbers is nothing, however sure.
    assert verdict(Metric(-1e-8, 1e-10, 48)) == "undecided"
    assert str(rows.tally([up, up, nothing, down])) == "2 of 4 [2, 3]"
    # Together: one interval of a sweep is wider than the same one alone.
    edge = effect(0.21)
    assert rows.tally([edge]).above == 1
    assert rows.tally([edge] * 10).above == 0
    np.testing.assert_allclose(rows.interval(edge)[0], 0.21 - 0.1 * stats.t.ppf(0.975, 47))


def test_the_atlas_writes_what_it_measured_and_reads_other_results(tmp_path):
    source = tmp_path / "results.json"
    read = [row for row in atlas.SECTIONS["rewards"] if row.check is None]
    values = {name: {"value": 1.0, "stderr": 0.1, "n": 4} for row in read for name in row.metrics}
    source.write_text(json.dumps({"metrics": values}))
    config = atlas.Config(output=tmp_path / "out", smoke=True, goodhart=source)
    path = atlas.main(config, console=QUIET)
    found = metrics_of(path)
    page = (tmp_path / "out" / "atlas.md").read_text().splitlines()
    assert len(page) == 2 + 2 + len(read)
    for row in read:
        (line,) = [line for line in page if f"| {row.claim} |" in line]
        assert "| held |" in line
    asking = next(r for r in atlas.SECTIONS["rewards"] if r.function == "posterior.deferral")
    assert found[f"{asking.key}/3/effect"]["value"] > 0
    short = json.loads((tmp_path / "out" / "rewards.json").read_text())
    assert short["metrics"].keys() == found.keys()
    for name, metric in found.items():
        np.testing.assert_allclose(short["metrics"][name]["value"], metric["value"], rtol=1e-3)
    source.write_text(json.dumps({"metrics": {}}))
    with pytest.raises(InputError, match="no metric"):
        atlas.main(config, console=QUIET)
    with pytest.raises(InputError, match="no row has this text"):
        atlas.main(dataclasses.replace(config, only="perpetual motion"), console=QUIET)


@pytest.mark.parametrize("section", atlas.SECTIONS)
def test_every_row_has_committed_numbers_and_no_number_is_without_its_row(section):
    shown = atlas.SECTIONS[section]
    metrics = rows.recorded(section)
    assert len({row.key for row in shown}) == len(shown)
    names = set()
    for row in shown:
        kinds = ("effect", "control") if row.control else ("effect",)
        at = ["/".join(filter(None, (row.key, label))) for label in row.labels]
        names |= {f"{place}/{kind}" for place in at for kind in kinds}
    assert metrics.keys() == names


@pytest.mark.parametrize("section", atlas.SECTIONS)
def test_the_page_says_what_the_numbers_say(section):
    """Each verdict again, from the JSON file and the definition; the README's table is the same."""
    raw = json.loads((rows.HERE / f"{section}.json").read_text())["metrics"]
    text = page.document({section: atlas.SECTIONS[section]})
    table = page.table(atlas.SECTIONS[section], rows.recorded(section))
    assert table in text
    for row, line in zip(atlas.SECTIONS[section], table.splitlines()[2:], strict=True):
        mine = [
            m
            for name, m in raw.items()
            if name.startswith(row.key + "/") and name.endswith("/effect")
        ]
        assert len(mine) == len(row.labels)
        signs = []
        for m in mine:
            half = stats.t.ppf(1 - 0.05 / 2 / len(mine), m["n"] - 1) * m["stderr"]
            low, high = m["value"] - half, m["value"] + half
            signs.append(1 if low > 1e-6 else -1 if high < -1e-6 else 0)
        if min(signs) == 1:
            expected = "held"
        elif 1 in signs:
            expected = "in part"
        else:
            expected = "not held" if -1 in signs else "undecided"
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[:4] == [row.system, row.claim, row.function, expected]
        assert cells[4].startswith(f"{signs.count(1)} of {len(mine)} ")
        assert row.claim in cells[7] or row.source in cells[7]
    assert table in (rows.HERE / "README.md").read_text()


def test_gaos_forms_are_recovered_from_their_own_curves():
    spent = np.tile([0.25, 0.5, 1.0, 2.0, 4.0], (3, 1))
    d = np.sqrt(spent)
    a, b = np.array([[1.0], [2.0], [0.5]]), np.array([[0.3], [0.1], [0.7]])
    for form, curve in (("square", d * (a - b * d)), ("log", d * (a - b * np.log(d)))):
        found = getattr(goodhart.fitted(spent, curve), form)
        np.testing.assert_allclose(found[:, :2], np.hstack([a, b]), atol=1e-10)
        np.testing.assert_allclose(found[:, 2], 0, atol=1e-20)


@pytest.mark.slow
def test_the_benchmark_of_heads_and_people_first_agrees_with_plain_numpy(tmp_path):
    found = metrics_of(benchmark.main(benchmark.Config(output=tmp_path, smoke=True), console=QUIET))
    assert found["EM/disagreement"]["value"] < 1e-6
    assert found["heads/8 heads/times one head"]["value"] > 0
    with pytest.raises(InputError, match="at least two"):
        benchmark.main(benchmark.Config(output=tmp_path, turns=1), console=QUIET)


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
    (row,) = [row for row in policy.ROWS if row.claim.startswith(claim)]
    found = atlas.measured(row, atlas.Config(worlds=16), {})
    verdict = lambda name: rows.tally(rows.effects_of(row, found, name)).verdict  # noqa: E731
    assert verdict("effect") == said
    assert verdict("control") == ("held" if said == "not held" else "not held")


def test_rows_name_functions_of_the_library():
    for row in policy.ROWS:
        module, _, name = row.function.partition(".")
        assert callable(getattr(getattr(core, module), name)), row.function
