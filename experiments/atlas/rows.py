"""What a row of the atlas is, and the verdict that its numbers have: over all settings of its axis.

A claim is measured at every setting of an axis (a KL, a share of noise, a scale), over the same
random worlds. The intervals of its settings hold together, at 95 % for all of them (Bonferroni,
Student's t over worlds), so that the share of settings in which the claim is true lies between
those whose interval is above 0 and those whose interval is not below.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Array, Float
from scipy import stats

from jax_klrlhf.results import Metric

HERE = Path(__file__).parent
ROUNDING = 1e-6
"""An effect this small is 0: what float32 leaves of equal numbers."""


class Effect(NamedTuple):
    """Of one world: above 0 speaks for the claim.

    The control is the same measurement where the idea must not work, or where the claim is empty;
    it says what size of effect means nothing.
    """

    effect: Float[Array, ""]
    control: Float[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A claim, measured by ``check(key, setting) -> Effect`` at each of ``settings``.

    A row without settings is measured once, by ``check(key)``. A setting is a number, or several
    for a grid. A row without a check is read from another experiment's results.
    """

    system: str
    claim: str
    function: str
    check: Callable[..., Effect] | None = None
    axis: str = ""
    """What the settings are."""
    settings: tuple[Any, ...] = ()
    source: str = ""
    """Experiment whose ``metrics`` are the effects, one for each setting."""
    metrics: tuple[str, ...] = ()
    control: str = ""

    @property
    def key(self) -> str:
        """Its name in results.json."""
        return f"{self.system}/{self.claim}"

    @property
    def labels(self) -> tuple[str, ...]:
        """What each setting is called."""
        if not self.settings:
            return ("",)
        return tuple(
            ", ".join(f"{x:g}" for x in s) if isinstance(s, tuple) else f"{s:g}"
            for s in self.settings
        )

    @property
    def command(self) -> str:
        """What measures it again."""
        if self.check is None:
            return f"python -m experiments.{self.source}"
        return f'python -m experiments.atlas --only "{self.claim}"'


def interval(effect: Metric, *, settings: int = 1) -> tuple[float, float]:
    """95 % for all of ``settings`` together; a number without a spread is its own interval."""
    if effect.stderr is None or effect.n is None or effect.n < 2:
        return effect.value, effect.value
    half = float(stats.t.ppf(1 - 0.025 / settings, effect.n - 1)) * effect.stderr
    return effect.value - half, effect.value + half


class Tally(NamedTuple):
    """Of the settings of a row."""

    above: int
    below: int
    total: int

    @property
    def verdict(self) -> str:
        """In words.

        ``held``: above 0 in every setting. ``not held``: above 0 in none, and below in one or more.
        ``in part``: above 0 in some. ``undecided``: 0 is within every interval.
        """
        if self.above == self.total:
            return "held"
        if self.above:
            return "in part"
        return "not held" if self.below else "undecided"

    def __str__(self) -> str:
        """``4 of 6 [4, 5]``: settings above 0, and the interval of how many truly are."""
        return f"{self.above} of {self.total} [{self.above}, {self.total - self.below}]"


def tally(effects: Sequence[Metric]) -> Tally:
    """How many settings are above 0, how many below. An effect that is 0 exactly is neither."""
    ends = [interval(effect, settings=len(effects)) for effect in effects]
    above, below = (
        sum(low > ROUNDING for low, _ in ends),
        sum(high < -ROUNDING for _, high in ends),
    )
    return Tally(above, below, len(ends))


def effects_of(row: Row, metrics: Mapping[str, Metric], name: str = "effect") -> list[Metric]:
    """Of each setting, from a flat map of metrics; KeyError where the row was not measured."""
    return [metrics["/".join(filter(None, (row.key, label, name)))] for label in row.labels]


def compact(record: dict[str, Any]) -> str:
    """A results.json small enough to commit: four digits, one metric a line."""
    lines = []
    for name, metric in record["metrics"].items():
        short = {
            k: float(f"{v:.4g}") if k != "n" else v for k, v in metric.items() if v is not None
        }
        lines.append(f"{json.dumps(name)}: {json.dumps(short)}")
    kept = ("name", "seconds", "versions", "device", "seeds")
    head = "".join(f"{json.dumps(k)}: {json.dumps(record[k])},\n" for k in kept if k in record)
    return "{\n" + head + '"metrics": {\n' + ",\n".join(lines) + "\n}}\n"


def recorded(section: str) -> dict[str, Metric]:
    """The committed numbers of a section."""
    record = json.loads((HERE / f"{section}.json").read_text())
    return {name: Metric(**value) for name, value in record["metrics"].items()}
