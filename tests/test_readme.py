"""README's programs run as printed; its two rounds call the same functions of the core."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_klrlhf import bandit

README = Path(__file__).resolve().parents[1] / "README.md"
FIRST, TRAINING, *BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def _run(source: str) -> dict:
    scope: dict = {}
    exec(compile(source, "README.md", "exec"), scope)
    return scope


def _core_calls(source: str) -> set[str]:
    return set(re.findall(r"\b(?:bradley_terry|gibbs|pairs)\.\w+", source))


@pytest.mark.slow
def test_the_first_lines_run(capsys):
    scope = _run(FIRST)
    setting = scope["problem"].setting
    # Better than pi0, which is what one has without any line.
    start = bandit.gap(scope["problem"], setting.ref_log_prob)
    assert 0 <= scope["run"].gap < start
    name, _, number = capsys.readouterr().out.rpartition("=")
    assert name == "J(pi*) - J(pi) "
    np.testing.assert_allclose(float(number), scope["run"].gap, rtol=1e-5)


@pytest.mark.slow
def test_the_training_example_runs_and_its_policy_is_better(capsys):
    _run(TRAINING)
    line = capsys.readouterr().out.splitlines()[-1]
    before, after = (float(part.split("±")[0]) for part in line.split("->"))
    error = max(float(part.split("±")[1]) for part in line.split("->"))
    assert after - before > 5 * error


def test_the_bandit_round_runs():
    scope = _run(BLOCKS[0])
    assert np.abs(scope["gradient"]).max() > 0


def test_the_language_model_round_runs(stories_model):
    scope = _run(BLOCKS[1].replace("path/to/model", str(stories_model)))
    sizes = [float(np.abs(leaf).max()) for leaf in jax.tree.leaves(scope["gradient"])]
    assert all(np.isfinite(sizes))
    assert max(sizes) > 0
    # At pi0 every implicit reward is 0, so that the loss is that of a coin toss.
    np.testing.assert_allclose(scope["loss"](scope["params"]), np.log(2), rtol=1e-5)


def test_both_call_the_same_functions():
    bandit, language_model = map(_core_calls, BLOCKS[:2])
    assert language_model <= bandit
    assert language_model == {
        "bradley_terry.nll",
        "bradley_terry.sample",
        "gibbs.implicit_reward",
        "pairs.best_worst",
    }
