"""What a run's log remembers between its lines: part of every checkpoint.

A log line is about all steps since the one before it, and a run may be killed between two lines.
So the sums of an unfinished line, the updates that were skipped and the warnings that were given
are saved with the state, and a run that goes on writes the lines it would have written.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_klrlhf.results import Metric
from jax_klrlhf.training import health, metrics
from jax_klrlhf.training.health import Stopped
from jax_klrlhf.training.metrics import Metrics
from jax_klrlhf.training.step import Info

_BEHIND = 4  # steps that may run on while the flag of one is looked at
_NAMED = 20  # skipped steps that are named; the rest are counted


class Window(NamedTuple):
    """Sums over steps, added up in float64 and in their order: plain numbers, as JSON has them."""

    loss: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    """Of :class:`.step.Moments`, over the updates that were taken; the report's likewise."""
    report: Mapping[str, tuple[float, ...]] = {}
    tokens: int = 0
    slots: int = 0
    grad_norm: float = math.nan
    """Of the last update that was taken; likewise the next."""
    update_norm: float = math.nan

    def add(self, info: Info, fields: Sequence[str]) -> "Window":
        """One more step. Of a skipped one only the tokens count: the rest may be anything."""
        counted = self._replace(
            tokens=self.tokens + int(info.tokens), slots=self.slots + int(info.slots)
        )
        if not bool(info.finite):
            return counted
        zero = (0.0,) * 4
        found = {name: getattr(info.report, name) for name in fields}
        return counted._replace(
            loss=_plus(self.loss, info.loss),
            report={
                name: _plus(self.report.get(name, zero), moments)
                for name, moments in found.items()
                if moments is not None
            },
            grad_norm=float(info.grad_norm),
            update_norm=float(info.update_norm),
        )

    def named(self, names: Mapping[str, str]) -> Metrics:
        """The line: averages over all rows of the steps, norms of the last."""
        moments = {
            name: metrics.mean(self.report[f]) for f, name in names.items() if f in self.report
        }
        return {
            "loss": metrics.mean(self.loss),
            **moments,
            "grad_norm": Metric(self.grad_norm),
            "update_norm": Metric(self.update_norm),
            "perf/padding_fraction": Metric(1 - self.tokens / max(self.slots, 1)),
        }


def _plus(total: tuple[float, ...], moments: Any) -> tuple[float, ...]:
    return tuple(a + float(np.float64(b)) for a, b in zip(total, moments, strict=True))


class History:
    """The log of a run as far as it has come.

    Args:
        names: what the report's fields are called in the log (``task.names``).
        limits: of the health checks.
        steps: of the whole run.
        saved: :meth:`state` of the checkpoint that the run goes on from.

    Steps are added as they are dispatched; only :meth:`settle` waits for them.
    """

    def __init__(
        self, names: Mapping[str, str], limits: health.Limits, *, steps: int, saved: Any = None
    ):
        self._names, self._limits = names, limits
        # A run of fewer steps is stopped where none of them could be taken.
        self._most = min(limits.skipped, steps)
        self._window, self._seen = Window(), health.Seen()
        self._pending: list[Info] = []
        self._looked = self._step = 0
        self.skipped, self.named, self._row, self._fresh = 0, [], 0, 0
        """Updates skipped in all, the first of their steps, in a row until now, since the line."""
        self.last: Metrics = {}
        """Last value of everything logged."""
        if saved is not None:
            self._restore(saved)

    def add(self, number: int, info: Info) -> None:
        """Step ``number`` has been dispatched.

        Raises:
            Stopped: where too many updates in a row were skipped, a few steps ago.
        """
        self._pending.append(info)
        self._step = number
        self._look(_BEHIND)

    def settle(self) -> None:
        """Wait for all steps and add them up. Raises :class:`Stopped` as :meth:`add`."""
        self._look(0)
        infos: list[Info] = jax.device_get(self._pending)
        for info in infos:
            self._window = self._window.add(info, list(self._names))
        self._pending, self._looked = [], 0

    def line(self) -> Metrics:
        """The log line of the steps since the last one, and a new beginning."""
        self.settle()
        found = self._window.named(self._names) | {"updates/skipped": Metric(float(self.skipped))}
        self._window = Window()
        return found

    def observe(self, number: int, found: Metrics) -> list[health.Finding]:
        """What is newly wrong with a log line (:func:`.health.observe`)."""
        self._seen, findings = health.observe(self._seen, number, found, self._limits)
        if self._fresh:
            findings.insert(0, health.skipped(number, self._fresh, self.skipped, self.named))
        self._fresh = 0
        return findings

    def state(self) -> Any:
        """All of it, as JSON has it; after :meth:`settle`."""
        return {
            "window": self._window._asdict(),
            "seen": self._seen.state(),
            "skipped": [self.skipped, self.named, self._row, self._fresh],
            "last": {name: metric._asdict() for name, metric in self.last.items()},
        }

    def _restore(self, saved: Any) -> None:
        window = dict(saved["window"])
        window["loss"] = tuple(window["loss"])
        window["report"] = {name: tuple(sums) for name, sums in window["report"].items()}
        self._window, self._seen = Window(**window), health.Seen.of(saved["seen"])
        self.skipped, self.named, self._row, self._fresh = saved["skipped"]
        self.last = {name: Metric(**metric) for name, metric in saved["last"].items()}

    def _look(self, behind: int) -> None:
        """Count the skipped updates among the steps up to ``behind`` before the last.

        A constant distance, not whatever has finished: a run stops at the same step every time.
        """
        first = self._step - len(self._pending) + 1
        while len(self._pending) - self._looked > behind:
            number = first + self._looked
            taken = bool(self._pending[self._looked].finite)
            self._looked += 1
            if taken:
                self._row = 0
                continue
            self._row, self.skipped, self._fresh = self._row + 1, self.skipped + 1, self._fresh + 1
            if len(self.named) < _NAMED:
                self.named.append(number)
            if self._row >= self._most:
                raise Stopped(health.too_many(number, self._row))
