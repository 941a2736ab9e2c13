"""An atlas of claims: one row for each system, what it claims, and what exact small worlds say.

Every row is a function of the library and an exact check over random worlds, at every setting of an
axis; the verdict follows from the intervals, not from a person (`rows.py`). Effects above 0 speak
for the claim. Worlds and sizes are ours: they show direction, not a paper's size.

Some rows are read from the `results.json` of `experiments.goodhart` (`--goodhart`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import study
from experiments.atlas import (
    checks_groups,
    checks_labels,
    checks_people,
    checks_transforms,
    page,
    policy,
    rows,
)
from experiments.atlas.rows import Row
from jax_klrlhf import results
from jax_klrlhf.errors import InputError

SECTIONS: dict[str, tuple[Row, ...]] = {
    "rewards": (
        *checks_groups.ROWS,
        *checks_labels.ROWS,
        *checks_transforms.ROWS,
        *checks_people.ROWS,
    ),
    "policies": policy.ROWS,
}
"""Each has its numbers in ``experiments/atlas/<section>.json``, committed, run in one piece."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The atlas of claims."""

    output: Path = Path("results/atlas")
    """Where results.json and, for a whole section, its page and its committed form go."""
    section: str = "rewards"
    goodhart: Path | None = None
    """results.json of `experiments.goodhart`: adds the rows that are read from it."""
    worlds: int = 48
    """Random worlds of each check."""
    seed: int = 0
    """Root of all randomness."""
    only: str = ""
    """Rows whose system, claim or function has this text."""
    smoke: bool = False
    """Four worlds and two rows, to see that it runs."""

    def resized(self) -> "Config":
        """This, or the small size if smoke was asked for."""
        return dataclasses.replace(self, worlds=4) if self.smoke else self

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if self.worlds < 2:
            raise InputError(f"--worlds {self.worlds}: an interval needs at least two.")
        if self.section not in SECTIONS:
            raise InputError(f"--section {self.section}: choose from {', '.join(SECTIONS)}.")
        if self.goodhart is not None and not self.goodhart.is_file():
            raise InputError(f"{self.goodhart}: no such file; --goodhart takes a results.json.")
        if not self.rows():
            raise InputError(f"--only {self.only}: no row has this text.")

    def rows(self) -> list[Row]:
        """Those asked for."""
        chosen = [
            row
            for row in SECTIONS[self.section]
            if self.only in f"{row.system} {row.claim} {row.function}"
            and (row.check is not None or self.goodhart is not None)
        ]
        if self.smoke:
            small = ("posterior.deferral", "reshape.shaped")
            chosen = [row for row in chosen if row.function in small or row.check is None]
        return chosen


def measured(row: Row, config: Config, other: Mapping[str, Any]) -> dict[str, results.Metric]:
    """Effect and control at every setting, by their names in results.json."""
    named = ["/".join(filter(None, (row.key, label))) for label in row.labels]
    if row.check is None:
        missing = [name for name in row.metrics if name not in other]
        if missing:
            raise InputError(f"--{row.source}: no metric {missing[0]!r}; run it at full size.")
        found = (results.Metric(**other[name]) for name in row.metrics)
        return {f"{at}/effect": metric for at, metric in zip(named, found, strict=True)}
    keys = jax.random.split(jax.random.key(config.seed), config.worlds)
    measure = jax.vmap(row.check) if not row.settings else _over(row.check)
    settings = (jnp.array(row.settings),) if row.settings else ()
    effect, control = jax.tree.map(np.asarray, jax.jit(measure)(keys, *settings))
    metrics = {}
    for k, at in enumerate(named):
        metrics[f"{at}/effect"] = results.mean(effect[k] if row.settings else effect)
        metrics[f"{at}/control"] = results.mean(control[k] if row.settings else control)
    return metrics


def _over(check: Callable[..., rows.Effect]) -> Callable[..., rows.Effect]:
    """Settings one after the other, the same worlds in each: one compilation, little memory."""
    return lambda keys, settings: jax.lax.map(
        lambda setting: jax.vmap(lambda key: check(key, setting))(keys), settings
    )


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run the checks, print and write the atlas; returns the path of ``results.json``."""
    here = study.begin("atlas", config, console=console)
    config = here.config
    other = {}
    if config.goodhart is not None:
        remedy = "--goodhart takes the results.json of experiments.goodhart"
        other = results.read_json(config.goodhart, remedy=remedy)["metrics"]
    metrics: dict[str, results.Metric] = {}
    for row in config.rows():
        metrics |= measured(row, config, other)
        tally = rows.tally(rows.effects_of(row, metrics))
        here.console.print(f"{row.system}: {row.claim}: {tally.verdict}, {tally}", highlight=False)
    _print(config.rows(), metrics, here.console)
    path = here.end(metrics, beside="the page")
    record = results.read_json(path, remedy="run again")
    (here.output / f"{config.section}.json").write_text(rows.compact(record))
    (here.output / "atlas.md").write_text(page.table(config.rows(), metrics))
    return path


def _print(shown: list[Row], metrics: Mapping[str, results.Metric], console: Console) -> None:
    table = Table(title="atlas", title_justify="left")
    for name in page.HEAD[:-1]:
        table.add_column(name)
    for row in shown:
        table.add_row(*page.cells(row, metrics)[:-1])
    console.print(table)


cli = study.entry(main, Config, __doc__)
