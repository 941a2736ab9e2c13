"""A run that is killed, wherever, ends with the same bits as one that is not."""

import functools
import io
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
from jax_klrlhf.training import checkpoint, health, loop, metrics, state, step, tasks
from tests.training import toy

MODEL = toy.language_model()
STEPS, SAVE_EVERY = 9, 2
LOSS = functools.partial(objectives.sigmoid, kl_coef=0.3)
QUIET = Console(quiet=True)
TASK = tasks.preference(MODEL, LOSS, report_coef=0.3)
CLOCKS = {"time", "perf/tokens_per_second", "perf/steps_per_second"}


@functools.cache
def made():
    """The step and its optimizer, compiled once."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS))
    return step.make_step(TASK, optimizer, micro_batches=2), optimizer


def measured(carried):
    """An evaluation that costs nothing: the parameters' norm."""
    return {"eval/norm": Metric(float(optax.tree.norm(carried.params)))}


def run(folder: Path, *, evaluate=measured, sinks=(), steps=STEPS, batches=None, **options):
    """One run with everything on; `options` as for loop.train."""
    train, optimizer = made()
    carried = state.init(jax.random.key(1), MODEL.init(jax.random.key(0)), optimizer)
    batches = loop.Repeat(batches or [toy.batch(seed) for seed in range(4)])
    store = checkpoint.Checkpoints(folder / "checkpoints")
    console = options.pop("console", QUIET)
    try:
        carried, remembered = loop.resume(store, carried, batches, console=console)
        log = metrics.json_lines(folder / "metrics.jsonl", after=int(carried.step))
        given = {"log_every": 3, "save_every": SAVE_EVERY, "evaluate_every": 4} | options
        return loop.train(
            train,
            carried,
            batches,
            steps=steps,
            names=TASK.names,
            checkpoints=store,
            config={"steps": STEPS},
            sinks=[log, *sinks],
            evaluate=evaluate,
            log=remembered,
            console=console,
            **given,
        )
    finally:
        store.close()


def lines(folder: Path):
    """The history but for times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]


def last(outcome):
    """What results.json is made of, but for times."""
    return {name: metric for name, metric in outcome.metrics.items() if name not in CLOCKS}


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


@pytest.mark.slow
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

    assert lines(tmp_path) == lines(folder)


class Killed(BaseException):
    pass


def killed_at(moment: int, folder: Path) -> bool:
    """Run up to the ``moment``-th of the things that happen, dying there; False: it ended before.

    What happens: a batch is taken; a line is about to be written, or has been; an evaluation
    begins, or has ended; a checkpoint is about to be begun, or has been.
    """
    left, repeat = moment, loop.Repeat

    def tick(*_):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    class Batches(repeat):
        def __next__(self):
            tick()
            return super().__next__()

    def evaluate(carried):
        tick()
        found = measured(carried)
        tick()
        return found

    save = checkpoint.Checkpoints.save

    def saved(self, *arguments, **named):
        tick()
        save(self, *arguments, **named)
        tick()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Repeat", Batches)
        patch.setattr(checkpoint.Checkpoints, "save", saved)
        try:
            run(folder, evaluate=evaluate, sinks=[tick])
        except Killed:
            return True
    return False


MOMENTS = 9 + 6 + 2 * 3 + 2 * 5
"""Batches; lines (3 of training, 3 of evaluations); evaluations; checkpoints."""


@pytest.mark.parametrize("seed", range(2))
def test_killed_twice_anywhere_the_history_and_results_are_the_same(seed, whole, tmp_path):
    first, second = np.random.default_rng(seed).permutation(MOMENTS)[:2]
    assert killed_at(int(first), tmp_path)
    killed_at(int(second), tmp_path)
    outcome = run(tmp_path)
    assert lines(tmp_path) == lines(whole[1])
    assert last(outcome) == last(whole[0])
    assert checkpoint.equal(outcome.state, whole[0].state)


def test_an_evaluation_killed_after_its_checkpoint_is_made_up(whole, tmp_path):
    def killed(at):
        def evaluate(carried):
            die_at(int(carried.step), at)
            return measured(carried)

        with pytest.raises(Killed):
            run(tmp_path, evaluate=evaluate)

    killed(4)
    assert [row["step"] for row in lines(tmp_path)] == [3]
    # After the last step no step is left to take, but an evaluation.
    killed(9)
    assert [row["step"] for row in lines(tmp_path)] == [3, 4, 6, 8, 9]
    run(tmp_path)
    outcome = run(tmp_path)  # ended already: nothing is written twice
    assert lines(tmp_path) == lines(whole[1])
    assert [(row["step"], "loss" in row) for row in lines(tmp_path)] == [
        (3, True), (4, False), (6, True), (8, False), (9, True), (9, False)
    ]  # fmt: skip
    assert last(outcome) == last(whole[0])
    assert "loss" in outcome.metrics


def bad(seed):
    given = toy.batch(seed)
    return given._replace(ref_log_prob=np.full_like(given.ref_log_prob, np.nan))


def text_of(console):
    return " ".join(console.file.getvalue().split())


def test_skipped_updates_are_counted_and_named_and_a_restart_knows_of_them(tmp_path):
    batches = [toy.batch(0), bad(1), toy.batch(2), bad(3)]
    console = Console(file=io.StringIO(), width=200)
    options = {"batches": batches, "log_every": 4, "save_every": 3, "evaluate": None}
    outcome = run(tmp_path / "a", console=console, **options)
    rows = lines(tmp_path / "a")
    assert [(row["step"], row["updates/skipped"]) for row in rows] == [(4, 2), (8, 4), (9, 4)]
    # Averages are over the updates that were taken.
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert outcome.metrics["updates/skipped"].value == 4
    text = text_of(console)
    assert "step 4: 2 updates since the last line and 2 in all were skipped" in text
    assert "finite: 2, 4, 6, 8." in text
    assert "step 9:" not in text
    # Restarted after the skipped updates: the same lines, and the trace.
    with pytest.raises(Killed):
        run(tmp_path / "b", sinks=[lambda n, _: die_at(n, 8)], **options)
    console = Console(file=io.StringIO(), width=200)
    run(tmp_path / "b", console=console, **options)
    assert lines(tmp_path / "b") == rows
    assert "3 updates before it were skipped" in text_of(console)
    assert "steps 2, 4, 6" in text_of(console)


def die_at(number, when):
    if number == when:
        raise Killed


@pytest.mark.parametrize("resumed", [False, True])
def test_too_many_skipped_in_a_row_stop_the_run_where_they_do(resumed, tmp_path):
    """Between two log lines, and in a run that goes on beyond the first of them."""
    batches = [toy.batch(0), toy.batch(1), *map(bad, range(7))]
    options = {"batches": batches, "log_every": 100, "save_every": 4, "evaluate": None}
    limits = health.Limits(skipped=3)
    if resumed:
        with pytest.raises(loop.Stopped):
            run(tmp_path, limits=limits, **options)
        assert sorted(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")) == [4]
    with pytest.raises(loop.Stopped, match=r"step 5: the loss or the gradient.* 3 times in a row"):
        run(tmp_path, limits=limits, **options)


def test_the_log_has_the_promised_names(whole):
    outcome, folder = whole
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    row = [row for row in rows if "loss" in row][-1]
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
    with pytest.raises(loop.Stopped, match=r"step 3: the loss or the gradient.*learning rate"):
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
