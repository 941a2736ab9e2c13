"""The loop around a training step: batches, log, evaluation, checkpoints, health, signals.

The step number is the run's only clock. Everything that happens at a step (a log line, an
evaluation, a checkpoint, a warning, a stop) happens at the same one in a run that was killed and
started again. The final parameters are the same to the bit, and so are ``metrics.jsonl`` and the
results but for times: what a log line averages is part of every checkpoint (:mod:`.history`), and
an evaluation that was killed after its checkpoint is made up for.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jax_klrlhf import placement
from jax_klrlhf.results import Metric
from jax_klrlhf.training import health, metrics
from jax_klrlhf.training.checkpoint import Checkpoints
from jax_klrlhf.training.health import Stopped
from jax_klrlhf.training.history import History
from jax_klrlhf.training.metrics import Metrics, Sink
from jax_klrlhf.training.state import TrainState
from jax_klrlhf.training.step import TrainStep

PROFILED = 3
"""Steps of a trace."""
SHOWN = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "eval/loss",
    "eval/rewards/accuracies",
    "eval/kl/ref",
    "perf/tokens_per_second",
)


@runtime_checkable
class Batches(Protocol):
    """Batches without end, with a position that JSON holds (``data.Stream`` is one)."""

    def __next__(self) -> Any:
        """This process's part of the next batch, on the host."""
        ...

    def state(self) -> Any:
        """Position of the next batch."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from a position."""
        ...


class Repeat:
    """Batches in memory, in order, again and again."""

    def __init__(self, batches: Sequence[Any]):
        if not batches:
            raise ValueError("Repeat: no batches to repeat.")
        self._batches, self._next = list(batches), 0

    def __next__(self) -> Any:
        """The next batch."""
        batch = self._batches[self._next % len(self._batches)]
        self._next += 1
        return batch

    def state(self) -> int:
        """Batches given so far."""
        return self._next

    def restore(self, state: int) -> None:
        """Go on after ``state`` batches."""
        self._next = state


class Resumed(NamedTuple):
    """Where a run goes on from."""

    state: TrainState
    log: Any = None
    """What its log remembers, for :func:`train`."""


class Trace:
    """A trace of a few steps, for TensorBoard or Perfetto; nothing where there is no folder."""

    def __init__(self, folder: Path | None):
        self._folder, self._taken, self._running = folder, 0, False

    def step(self, number: int, compiled: bool) -> Any:
        """The context of one step."""
        if self._folder is not None and not self._running and compiled:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        if not self._running:
            return nullcontext()
        self._taken += 1
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def end(self, info: Any, *, last: bool) -> None:
        """After each step: write the trace, where it is whole."""
        if self._running and (last or self._taken == PROFILED):
            jax.block_until_ready(info)
            jax.profiler.stop_trace()
            self._folder, self._running = None, False


class Outcome(NamedTuple):
    """What a run came to."""

    state: TrainState
    metrics: Metrics
    """Last value of everything logged."""
    seconds: float


def resume(
    checkpoints: Checkpoints, state: TrainState, batches: Batches, *, console: Console | None = None
) -> Resumed:
    """The last whole checkpoint's state, ``batches`` moved to its position.

    ``state`` as it is where there is none. The console is told of checkpoints that were damaged.
    """
    if checkpoints.latest is None:
        return Resumed(state)
    found = checkpoints.restore(state)
    batches.restore(found.data)
    for damaged in found.damaged:
        (console or Console()).print(
            f"[yellow]warning[/yellow] {escape(str(checkpoints.folder))}: {escape(damaged)}; going "
            f"on from step {int(found.state.step)}",
            soft_wrap=True,
            highlight=False,
        )
    return Resumed(found.state, found.log)


def train(
    step: TrainStep,
    state: TrainState,
    batches: Batches,
    *,
    steps: int,
    names: Mapping[str, str],
    log_every: int = 10,
    save_every: int | None = None,
    save_last: bool = True,
    evaluate_every: int | None = None,
    evaluate: Callable[[TrainState], Metrics] | None = None,
    checkpoints: Checkpoints | None = None,
    config: Any = None,
    sinks: Sequence[Sink] = (),
    learning_rate: Callable[[Any], Any] | None = None,
    limits: health.Limits | None = None,
    tokens: tuple[int | None, int | None] = (None, None),
    profile: Path | None = None,
    log: Any = None,
    console: Console | None = None,
) -> Outcome:
    """Train until ``steps`` steps have been taken in all, from the state's own step on.

    Args:
        step: from :func:`.make_train_step` and the like; ``state`` is used up by it.
        state: fresh, or from :func:`resume`.
        batches: see :class:`Batches`; :class:`Repeat` for a list.
        steps: number of the last step.
        names: what the report's fields are called in the log (``task.names``).
        log_every: steps between log lines.
        save_every: steps between checkpoints.
        save_last: whether the last step is saved in any case.
        evaluate_every: steps between evaluations; the last step is evaluated in any case.
        evaluate: metrics of a state, named ``eval/...``.
        checkpoints: where to save; nothing is saved without.
        config: saved with each checkpoint.
        sinks: where metrics go besides the terminal (:mod:`.metrics`).
        learning_rate: schedule, to be logged.
        limits: of the health checks; ``None`` is :class:`.health.Limits`'s own.
        tokens: ids of the begin and the end token, for the check of the first batch.
        profile: folder for a trace of :data:`PROFILED` steps, the first ones in a row that compile
            nothing; each process writes its own devices'.
        log: what :func:`resume` said the log remembers.
        console: the terminal; a quiet one prints nothing.

    Raises:
        Stopped: where too many updates in a row had to be skipped (:class:`.health.Limits`), or
            SIGTERM or SIGINT came (the run is then saved first).
    """
    began = time.perf_counter()
    mesh, leader = step.mesh, placement.leader()
    console = (console or Console()) if leader else Console(quiet=True)
    flops = metrics.flops_per_token(state)
    history = History(names, limits or health.Limits(), steps=steps, saved=log)
    shapes, rated, seconds = set(), [], 0.0
    trace = Trace(profile)
    number = first = int(state.step)

    def save(state: TrainState) -> None:
        if checkpoints is not None:
            history.settle()
            checkpoints.save(state, data=batches.state(), config=config, log=history.state())

    def publish(number: int, found: Metrics) -> None:
        history.last.update(found)
        if leader:
            for sink in sinks:
                sink(number, found)
            shown = "  ".join(f"{k} {_short(found[k])}" for k in SHOWN if k in found)
            console.print(f"step {number}/{steps}  {shown}", highlight=False, soft_wrap=True)
        warn(history.observe(number, found))

    def warn(findings: Sequence[health.Finding]) -> None:
        for finding in findings:
            console.print(
                f"[yellow]warning[/yellow] {finding.name}: {escape(finding.message)}",
                soft_wrap=True,
            )

    if history.skipped:
        console.print(
            f"step {number}/{steps}  {history.skipped} updates before it were skipped, their loss "
            f"or gradient not being finite: steps {', '.join(map(str, history.named))}",
            highlight=False,
            soft_wrap=True,
        )

    def end() -> NoReturn:
        if checkpoints is not None:
            checkpoints.wait()
        if checkpoints is None:
            kept = "this training has no checkpoints and would begin again"
        else:
            kept = "start again to go on from here"
        raise Stopped(
            f"step {number}: asked to end ({', '.join(asked) or 'by another process'}); {kept}."
        )

    def due(number: int) -> bool:
        every = evaluate_every is not None and number > 0 and number % evaluate_every == 0
        return evaluate is not None and every and number < steps

    with _progress(console, steps, number) as advance, _signals() as asked:
        if evaluate is not None and due(number):
            publish(number, evaluate(state))  # killed after its checkpoint, or told once more
        clock = time.perf_counter()
        while number < steps:
            host = next(batches)
            if number == first:
                warn(health.check_batch(host, begin=tokens[0], end=tokens[1]))
            shape = tuple(leaf.shape for leaf in jax.tree.leaves(host))
            if shape not in shapes:
                # A new shape compiles: its step is taken out of the rates.
                jax.block_until_ready(state.step)
                seconds += time.perf_counter() - clock
            with trace.step(number, shape in shapes):
                state, info = step(state, placement.put(host, mesh))
            if shape in shapes:
                rated.append(info)
            else:
                shapes.add(shape)
                jax.block_until_ready(info)
                clock = time.perf_counter()
            number += 1
            trace.end(info, last=number == steps)
            history.add(number, info)
            advance(number)
            final = number == steps
            if final or number % log_every == 0:
                jax.block_until_ready(info)
                seconds += time.perf_counter() - clock
                found = history.line() | metrics.rates(rated, seconds=seconds, flops=flops)
                if learning_rate is not None:
                    found["learning_rate"] = Metric(float(learning_rate(number - 1)))
                publish(number, found)
                rated, seconds, clock = [], 0.0, time.perf_counter()
            # Saved before it is evaluated: an evaluation that fails loses no training.
            if (final and save_last) or (save_every is not None and number % save_every == 0):
                save(state)
            if evaluate is not None and due(number):
                jax.block_until_ready(state.step)
                seconds += time.perf_counter() - clock
                publish(number, evaluate(state))
                clock = time.perf_counter()
            if not final and _agreed(asked, number % log_every == 0):
                save(state)
                end()
        # Here, so that a run killed between its last step and its evaluation makes up for it.
        if evaluate is not None:
            publish(number, evaluate(state))
        if _agreed(asked, True):
            end()
    if checkpoints is not None:
        checkpoints.wait()
    return Outcome(state, history.last, time.perf_counter() - began)


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Names of the signals that ask the run to end; a second one ends it at once."""
    asked: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {}

    def note(number: int, frame: Any) -> None:
        del frame
        asked.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agreed(asked: Sequence[str], meet: bool) -> bool:
    """Whether to end now. Several processes must end at the same step: they ask each other."""
    if placement.alone():
        return bool(asked)
    return meet and placement.anyone(bool(asked))


@contextmanager
def _progress(console: Console, steps: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left, on a terminal; log lines alone elsewhere."""
    if not console.is_terminal or console.quiet:
        yield lambda number: None
        return
    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    began = time.perf_counter()
    with bar:
        task = bar.add_task("", total=steps, completed=done, rate="")

        def advance(number: int) -> None:
            rate = (number - done) / max(time.perf_counter() - began, 1e-9)
            bar.update(task, completed=number, rate=f"{rate:.2f} steps/s")

        yield advance


def _short(metric: Metric) -> str:
    return f"{metric.value:,.0f}" if abs(metric.value) >= 1000 else f"{metric.value:.4f}"
