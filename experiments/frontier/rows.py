"""The table: a row of a method and a coefficient, pooled over seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.frontier import statements
from experiments.frontier.cells import BEST_OF, PI0, Found, Name
from experiments.frontier.evaluate import Judged
from jax_klrlhf.results import Metric, mean

Cells = Mapping[Name, Found]
COLUMNS = {
    "gold": "gold reward",
    "gold_gain": "gain over pi0",
    "second_gain": "gain, second judge",
    "kl": "KL(pi||pi0)",
    "wins": "win rate",
    "length": "tokens",
    "entropy": "entropy",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "proxy_gain": "proxy gain",
}


class Row(NamedTuple):
    """A method at a coefficient, over seeds."""

    method: str
    coefficient: float
    held_out: dict[str, Metric]
    ood: dict[str, Metric]
    difference: Metric
    """Gold reward in distribution less out of it."""
    loss: Metric
    """Gain over pi0 in distribution less out of it: pi0's own difference taken away."""
    over: Metric
    """Proxy gain less gold gain: over-optimization."""
    rounds: dict[str, Metric]
    """What the last round reported, mean over seeds."""
    rate: float | None
    """Learning rate."""

    @property
    def name(self) -> str:
        """As in the metrics."""
        if self.method == PI0:
            return PI0
        sign = "n" if self.method == BEST_OF else "kl_coef"
        return f"{self.method} {sign}={self.coefficient:g}"


def table(cells: Cells) -> list[Row]:
    """Every method and coefficient, pooled over seeds."""
    groups: dict[tuple[str, float], list[Found]] = {}
    for name, found in cells.items():
        groups.setdefault((name.method, name.coefficient), []).append(found)
    return [_row(method, coefficient, found) for (method, coefficient), found in groups.items()]


def _row(method: str, coefficient: float, found: Sequence[Found]) -> Row:
    def fields(at: Callable[[Found], Judged]) -> dict[str, Metric]:
        values = {name: [getattr(at(f), name) for f in found] for name in COLUMNS}
        return {name: statements.pooled(v) for name, v in values.items() if np.isfinite(v).all()}

    inside, outside = fields(lambda f: f.held_out), fields(lambda f: f.ood)
    if method == PI0:
        # By definition; two draws of it differ by chance.
        inside["gold_gain"] = outside["gold_gain"] = Metric(0.0)
    last = [f.rounds[-1] for f in found if f.rounds]
    shared = set.intersection(*(set(r) for r in last)) if last else set()
    return Row(
        method,
        coefficient,
        inside,
        outside,
        _minus(inside["gold"], outside["gold"]),
        _minus(inside["gold_gain"], outside["gold_gain"]),
        statements.pooled([f.held_out.proxy_gain - f.held_out.gold_gain for f in found]),
        {name: mean([r[name].value for r in last]) for name in sorted(shared)},
        found[0].rate,
    )


def _minus(one: Metric, two: Metric) -> Metric:
    """Of independent prompts."""
    return Metric(
        one.value - two.value, float(np.hypot(one.stderr or 0.0, two.stderr or 0.0)), one.n
    )
