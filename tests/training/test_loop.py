"""A run that is killed, wherever, ends with the same bits as one that is not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from jax_klrlhf.core import objectives
from jax_klrlhf.results import Metric
from jax_klrlhf.training import checkpoint, loop, metrics, state, step, tasks
from tests.training import toy

MODEL = toy.language_model()
STEPS, SAVE_EVERY = 9, 2
LOSS = lambda s: objectives.sigmoid(s.chosen_log_ratio, s.rejected_log_ratio, kl_coef=0.3)  # noqa: E731
QUIET = Console(quiet=True)


def run(folder: Path, *, evaluate=None, sinks=(), steps=STEPS, **options):
    """One run with everything on; `options` as for loop.train."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS))
    task = tasks.preference(MODEL, LOSS, kl_coef=0.3)
    train = step.make_step(task, optimizer, micro_batches=2)
    carried = state.init(jax.random.key(1), MODEL.init(jax.random.key(0)), optimizer)
    batches = loop.Repeat([toy.batch(seed) for seed in range(4)])
    store = checkpoint.Checkpoints(folder / "checkpoints")
    carried = loop.resume(store, carried, batches)
    log = metrics.json_lines(folder / "metrics.jsonl", after=int(carried.step))
    try:
        return loop.train(
            train,
            carried,
            batches,
            steps=steps,
            names=task.names,
            log_every=3,
            save_every=SAVE_EVERY,
            checkpoints=store,
            config={"steps": STEPS},
            sinks=[log, *sinks],
            evaluate=evaluate,
            console=QUIET,
            **options,
        )
    finally:
        store.close()


def child(folder: Path, kill: str) -> subprocess.CompletedProcess:
    """Start the run in a process of its own, which kills itself at the point named."""
    return subprocess.run(
        [sys.executable, "-m", "tests.training.test_loop", str(folder), kill],
        env=os.environ | {"PYTHONPATH": "."},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, kill: str) -> None:
    """In the child: SIGKILL at step 3, during the commit of step 4, or just after save() of 6."""
    if kill == "between":
        taken = step.TrainStep.__call__

        def call(self, carried, batch):
            if int(carried.step) == 3:
                die()
            return taken(self, carried, batch)

        step.TrainStep.__call__ = call
    if kill == "commit":
        import pathlib

        rename = pathlib.Path.rename
        os_rename = os.rename

        def watch(original):
            def renamed(source, target, *rest, **named):
                if Path(target).name == "4":
                    die()
                return original(source, target, *rest, **named)

            return renamed

        pathlib.Path.rename = watch(rename)
        os.rename = watch(os_rename)
    if kill == "saving":
        save = checkpoint.Checkpoints.save

        def saved(self, carried, **rest):
            save(self, carried, **rest)
            if int(carried.step) == 6:
                die()

        checkpoint.Checkpoints.save = saved
    outcome = run(folder)
    np.savez(folder / "final.npz", *map(np.asarray, jax.tree.leaves(outcome.state.params)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(folder), folder


def test_killed_runs_end_with_the_same_bits(whole, tmp_path):
    for kill, latest in [("between", {0, 2}), ("commit", {2}), ("saving", {4, 6})]:
        result = child(tmp_path, kill)
        assert result.returncode == -signal.SIGKILL, result.stderr
        steps = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
        assert max(steps, default=0) in latest  # a save under way may or may not have ended
        if (
            kill == "commit"
        ):  # killed while it was being written: the half is there, and passed over
            assert any("tmp" in p.name for p in (tmp_path / "checkpoints").iterdir())
    result = child(tmp_path, "never")
    assert result.returncode == 0, result.stderr
    outcome, folder = whole
    with np.load(tmp_path / "final.npz") as found:
        leaves = [found[name] for name in found.files]
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(outcome.state.params)]
    assert [x.tobytes() for x in leaves] == [x.tobytes() for x in expected]

    # The log is that of the run that was not killed: every line once, the same numbers.
    def lines(path):
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        clocks = {"time", "perf/tokens_per_second", "perf/steps_per_second"}
        return [{k: v for k, v in row.items() if k not in clocks} for row in rows]

    assert [row["step"] for row in lines(tmp_path)] == [3, 6, 9]
    # A line averages the steps since the last line or restart, so after a restart at step 4 the
    # line of step 6 has fewer; the last has the same three.
    assert lines(tmp_path)[-1] == lines(folder)[-1]


def test_the_log_has_the_promised_names(whole):
    outcome, folder = whole
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    for name in (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "grad_norm",
        "perf/padding_fraction",
        "perf/tokens_per_second",
    ):
        assert isinstance(row[name], float), name
    assert row["rewards/margins/stderr"] > 0
    assert outcome.metrics["loss"].value == row["loss"]
    assert int(outcome.state.step) == STEPS


def test_sigterm_saves_and_says_how_to_go_on(whole, tmp_path):
    def evaluate(carried):
        if int(carried.step) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"eval/loss": Metric(0.0)}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop.Stopped, match=r"step 5: asked to end \(SIGTERM\).*start again"):
        run(tmp_path, evaluate=evaluate, evaluate_every=5)
    assert signal.getsignal(signal.SIGTERM) == before
    outcome = run(tmp_path)
    assert checkpoint.equal(outcome.state, whole[0].state)


def test_not_finite_stops_with_the_reason(tmp_path):
    optimizer = optax.sgd(1e-2)
    train = step.make_train_step(MODEL, optimizer, LOSS)
    carried = state.init(jax.random.key(1), MODEL.init(jax.random.key(0)), optimizer)
    batch = toy.batch(0)
    batch = batch._replace(ref_log_prob=np.full_like(batch.ref_log_prob, np.inf))
    with pytest.raises(loop.Stopped, match=r"step 1: the loss is nan.*learning rate"):
        loop.train(
            train,
            carried,
            loop.Repeat([batch]),
            steps=3,
            names=tasks.PREFERENCE_NAMES,
            log_every=1,
            console=QUIET,
        )


def test_the_terminal_shows_progress_and_the_rate(tmp_path):
    console = Console(record=True, force_terminal=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    optimizer = optax.sgd(1e-2)
    carried = state.init(jax.random.key(1), MODEL.init(jax.random.key(0)), optimizer)
    loop.train(
        step.make_train_step(MODEL, optimizer, LOSS),
        carried,
        loop.Repeat([toy.batch(0)]),
        steps=2,
        names=tasks.PREFERENCE_NAMES,
        log_every=1,
        console=console,
    )
    text = console.export_text()
    console.file.close()
    assert "step 1/2" in text
    assert "steps/s" in text
    assert "rewards/margins" in text


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
