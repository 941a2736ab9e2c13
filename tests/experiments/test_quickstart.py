"""The main job at a toy size: both panels, what they leave on disk, and what they refuse."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from experiments.quickstart import practice, run, theory

ROOT = Path(__file__).resolve().parents[2]
THEORY = theory.Config(
    seeds=8, contexts=4, actions=4, dim=3, hidden=1, rounds=4, batch=8, choice_splits=4
)
PRACTICE = practice.Config(
    train_prompts=16,
    held_out_prompts=16,
    new_tokens=12,
    samples=2,
    eval_samples=2,
    steps=4,
    batch=8,
    evaluations=2,
    stories=80,
    sft_steps=6,
)


def _run(folder: Path, **settings) -> tuple[dict, str]:
    console = Console(width=200, record=True, file=open(folder / "log.txt", "w"))  # noqa: SIM115
    with console.file:
        path = run.main(run.Config(output=folder / "out", seeds=1, **settings), console=console)
    return json.loads(path.read_text()), console.export_text()


@pytest.mark.slow
def test_the_embedded_default_leaves_results_figures_and_tables(tmp_path):
    found, text = _run(tmp_path, theory=THEORY, practice=PRACTICE)
    metrics = found["metrics"]
    for method in theory.METHODS:
        gaps = [metrics[f"theory, ridge={r:g}/{method}/gap"] for r in THEORY.ridges]
        assert all(gap["n"] == THEORY.seeds for gap in gaps)
        assert all(gap["value"] >= 0 for gap in gaps)  # kl_coef KL(pi || pi*) is never negative
        assert len({gap["value"] for gap in gaps}) == len(gaps)  # the ridge reaches the estimate
        assert 0 <= metrics[f"theory, ridge=1/{method}/in_set"]["value"] <= 1
    assert metrics[f"theory/{theory.IDEAL}/gap"]["value"] >= 0
    for method in practice.METHODS:
        assert metrics[f"practice/{method}/reward"]["n"] == PRACTICE.held_out_prompts
        assert metrics[f"practice/{method}/kl"]["value"] >= -1e-5
        assert practice.NAMES.get(method, method) in text
    labels = {"pi0": 0, "offline": 16, "more offline": 32, "online": 32}
    for method in practice.METHODS:
        # Two equal answers to a prompt are no pair.
        count = metrics[f"practice/{method}/labels"]["value"]
        assert 0.8 * labels[method] <= count <= labels[method]
    # pi0's KL to itself is zero token by token, and it wins half of its own comparisons
    assert abs(metrics["practice/pi0/kl"]["value"]) < 1e-5
    assert math.isclose(metrics["practice/pi0/wins"]["value"], 0.5, abs_tol=0.25)
    # Text of both, and every difference with its verdict: one seed decides nothing.
    assert "aligned (online)" in text
    assert text.count("one seed decides nothing") >= 3
    # Without a terminal, plain lines.
    assert "pi0: maximum likelihood ..." in text
    assert "seed 0: three fits: 6 of 6" in text
    assert (tmp_path / "out" / "theory.png").stat().st_size > 1000
    assert (tmp_path / "out" / "practice.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_real_job_runs_on_the_real_model_and_the_real_choices(
    tmp_path, data_dir, stories_model
):
    found, text = _run(
        tmp_path,
        model=stories_model,
        prompts=data_dir / "stories" / "train.txt",
        gold=data_dir / "sentiment",
        choices=data_dir / "choices" / "train_tickets.npz",
        theory=THEORY,
        practice=PRACTICE,
    )
    metrics = found["metrics"]
    # A Bradley-Terry fit predicts these choices 0.69 of the time (cross-validated, measured apart
    # from this library); chance is 0.5, the standard error over 2,900 choices 0.009.
    assert 0.6 < metrics["choices/greedy/accuracy"]["value"] < 0.75
    # Sampled text of this model scores -0.69 with a standard deviation of 0.45 within a prompt;
    # 24 responses of 12 tokens are far noisier than the room left here.
    assert -2 < metrics["practice/pi0/reward"]["value"] < 0.5
    assert "tinystories656k" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "absent"], "--prompts, --gold missing"),
        (["--choices", "absent.npz"], "absent.npz: no such file"),
        (["--panels", "nothing"], "choose from theory and practice"),
        (["--seeds", "0"], "at least one seed"),
        (
            ["--model", "empty", "--prompts", "stories.txt", "--gold", "gold"],
            "negative.txt: missing",
        ),
        (
            ["--model", "empty", "--prompts", "empty.txt", "--gold", "whole"],
            "empty.txt: no sentence",
        ),
        (
            ["--model", "empty", "--prompts", "absent.txt", "--gold", "whole"],
            "absent.txt: no such file",
        ),
        (["--model", "empty", "--prompts", "stories.txt", "--gold", "whole"], "empty"),
        (["--output", "empty.txt"], "empty.txt: a file is in the way"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_any_compute(
    tmp_path, monkeypatch, capsys, arguments, said
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "stories.txt").write_text("Once there was a little boy named Ben. He ran.")
    for folder, names in {"gold": ["positive"], "whole": ["positive", "negative"]}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.txt").write_text("word\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quickstart", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run.cli()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def _judged(kl: float, reward: float) -> practice.Judged:
    full = lambda value: np.full(4, value)  # noqa: E731
    return practice.Judged(reward=full(reward), kl=full(kl), wins=full(0.5), length=full(9.0))


def test_a_difference_is_decided_by_students_interval_over_seeds():
    base = [_judged(1, 0.0)] * 3
    found = practice._gain([_judged(1, r) for r in (0.9, 1.0, 1.1)], base)
    # scipy's own t: mean 1, standard error 0.1 / sqrt(3), two degrees of freedom
    low, high = scipy.stats.t.interval(0.95, 2, loc=1, scale=0.1 / math.sqrt(3))
    assert found.text == f"better, +1.000 [{low:.3f}, {high:.3f}] gold reward"
    # Three standard errors, which two degrees of freedom do not take for certain.
    found = practice._gain([_judged(1, r) for r in (0.1, 0.3, 0.5)], base)
    assert found.text.startswith("undecided")
    assert practice._gain([_judged(1, -r) for r in (1.0, 1.1, 1.2)], base).text.startswith("worse")


def test_the_online_row_at_no_larger_kl_stands_where_it_differs():
    offline, ends = [_judged(2, 0.5)], [_judged(1.5, 0.6), _judged(3, 0.9)]
    path = {"pi0": [_judged(0, 0.0)], "offline": offline, "online": ends}
    assert practice._stopped(path) is ends[0]
    assert practice._stopped({**path, "online": ends[:1]}) is ends[0]
    assert practice._stopped({**path, "online": ends[1:]}) is path["pi0"][0]


def test_what_a_model_says_is_text_and_fits_eighty_columns(capsys):
    said = "[/red] [bold]danced[/bold] " + "word " * 30
    practice._tell_answers([practice.Answer(said, said, said, (0.0, 1.0))], Console(width=80))
    out = capsys.readouterr().out
    assert "[/red]" in out
    assert "[bold]" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_program_itself_exits_2_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.quickstart", "--gold", "absent"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "go together" in done.stderr
