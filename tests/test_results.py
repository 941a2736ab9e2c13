import dataclasses
import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from jax_klrlhf import results
from jax_klrlhf.errors import InputError


def test_mean_is_the_sample_mean_with_its_standard_error():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    metric = results.mean(jnp.asarray(values))
    assert metric.value == pytest.approx(4.0)
    assert metric.stderr == pytest.approx(stats.sem(values))
    assert metric.n == 4
    assert results.mean([3.0]).stderr is None
    with pytest.raises(ValueError, match="no values"):
        results.mean([])


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (950, 1000)])
def test_wilson_interval_against_scipy(hits, n):
    metric, (low, high) = results.proportion([True] * hits + [False] * (n - hits), z=1.96)
    level = math.erf(1.96 / math.sqrt(2))
    interval = stats.binomtest(hits, n).proportion_ci(level, method="wilson")
    assert metric.value == pytest.approx(hits / n)
    assert (low, high) == pytest.approx((interval.low, interval.high), abs=1e-12)


@dataclasses.dataclass(frozen=True)
class _Config:
    kl_coef: float = 0.1


def test_results_file_has_the_promised_keys_and_is_strict_json(tmp_path):
    path = results.write_results(
        tmp_path / "run",
        name="t",
        config=_Config(),
        seeds=[0, 1],
        seconds=1.5,
        metrics={"panel/method/gap": results.Metric(float("nan"), np.float32(0.5), 3)},
    )
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert set(found) == {"name", "config", "seeds", "versions", "device", "seconds", "metrics"}
    assert found["config"] == {"kl_coef": 0.1}
    assert found["metrics"]["panel/method/gap"] == {"value": None, "stderr": 0.5, "n": 3}
    assert found["device"]["count"] == 8
    assert not list(path.parent.glob("*.tmp"))


def test_an_output_that_cannot_be_a_folder_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: a file is in the way"):
        results.output_folder(tmp_path / "file")
    with pytest.raises(InputError, match="a file is in the way"):
        results.output_folder(tmp_path / "file" / "below")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(InputError, match="not writable"):
            results.output_folder(tmp_path / "locked")


def test_a_table_takes_names_as_text(capsys):
    rows = {"[/red] a": {"[bold]gap": results.Metric(1.0, 0.1)}}
    results.print_table("run[/x]", rows, console=Console(width=80), caption="of [/y]")
    out = capsys.readouterr().out
    for text in ("run[/x]", "[/red] a", "[bold]gap", "of [/y]", "1.000 ± 0.100"):
        assert text in out
