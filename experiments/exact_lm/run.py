"""The exact language bandit: a trained transformer whose every response is listed.

On it the optimum, the objective, the divergence and the law of each sampler are sums over all
responses, so that what is estimated elsewhere is known here. Source: Xiong et al., arXiv
2312.11456.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from experiments import plotting, study
from experiments.exact_lm import panels as measures
from experiments.exact_lm import world as worlds
from jax_klrlhf import results
from jax_klrlhf.errors import InputError

PANELS = ("fixed_point", "samplers", "rejection", "comparison", "coverage")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Run the panels; nothing is read from outside."""

    output: Path = Path("results/exact_lm")
    """Where results.json and the figure go."""
    panels: tuple[str, ...] = PANELS
    """Which panels to run."""
    seeds: int = 5
    """Independent repetitions of the comparison; the other panels count their own trials."""
    small: bool = False
    """A run of about a minute: a smaller world, fewer steps and two seeds."""
    world: worlds.Config = dataclasses.field(default_factory=worlds.Config)
    sizes: measures.Config = dataclasses.field(default_factory=measures.Config)

    def resized(self) -> "Config":
        """This, or the small size if it was asked for."""
        return small(self) if self.small else self

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        unknown = sorted(set(self.panels) - set(PANELS))
        if unknown or not self.panels:
            raise InputError(f"--panels {' '.join(unknown)}: choose from {', '.join(PANELS)}.")
        if self.seeds < 1:
            raise InputError(f"--seeds {self.seeds}: at least one seed is needed.")


def small(config: Config) -> Config:
    """The sizes of ``--small``."""
    return dataclasses.replace(
        config,
        seeds=2,
        world=worlds.Config(
            vocab=4, length=4, prompts=4, hidden=16, layers=1, kl_coef=1.0, sft_steps=100
        ),
        sizes=measures.Config(
            learning_rate=1e-2,
            fixed_point_pairs=2000, fixed_point_steps=500, evaluations=4, rejection_steps=(1, 2),
            proposals=2048, labels_per_round=48, rounds=2, steps=60, draws=5000,
            coverage_rows=(1000,), coverage_trials=40,
        ),
    )  # fmt: skip


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run the panels and return the path of ``results.json``."""
    start = study.begin("exact_lm", config, console=console)
    config, output, console = start.config, start.output, start.console
    here = worlds.build(config.world)
    console.print(
        f"{len(here.every.lengths)} responses to each of {config.world.prompts} prompts; "
        f"KL(pi*||pi0) = {_kl(here):.2f} nats"
    )
    split = jax.random.split(jax.random.key(1), len(PANELS))
    keys: dict[str, Any] = dict(zip(PANELS, split, strict=True))
    metrics: dict[str, results.Metric] = {}
    path, paths = [], {}
    for panel in (p for p in PANELS if p in config.panels):
        if panel == "fixed_point":
            found, path = measures.fixed_point(here, config.sizes, keys[panel])
        elif panel == "comparison":
            found, paths = measures.comparison(here, config.sizes, range(config.seeds))
        else:
            run = {
                "samplers": measures.samplers,
                "rejection": measures.rejection_chain,
                "coverage": measures.coverage,
            }[panel]
            found = run(here, config.sizes, keys[panel])
        metrics |= found
        _table(panel, found, console)
    _figure(here, path, paths, metrics, output / "exact_lm.png")
    return start.end(metrics, seeds=range(config.seeds), beside="exact_lm.png")


def _kl(here: worlds.World) -> float:
    star = worlds.optimum(here)
    return float((np.exp(star) * (star - here.base)).sum(1).mean())


def _table(panel: str, metrics: Mapping[str, results.Metric], console: Console) -> None:
    rows: dict[str, dict[str, results.Metric | str]] = {}
    for name, metric in metrics.items():
        _, method, column = name.split("/")
        if column.startswith("acceptance"):
            continue  # One per step: in results.json.
        tiny = abs(metric.value) < 1e-3 and metric.value != 0
        rows.setdefault(method, {})[column] = f"{metric.value:.1e}" if tiny else metric
    results.print_table(panel, rows, console=console, caption="± one standard error")


def _figure(
    here: worlds.World,
    path: Sequence[worlds.Exact],
    paths: Mapping[str, Sequence[measures.Path]],
    metrics: Mapping[str, results.Metric],
    target: Path,
) -> None:
    """The identity along training, the gap against labels, and multi-step rejection."""
    figure, axes = plotting.grid(1, 3)
    left, middle, right = axes[0]
    if path:
        at = range(len(path))
        eta = here.config.kl_coef
        left.semilogy(at, [e.gap.mean() for e in path], "o-", label=r"$J(\pi^*) - J(\pi)$")
        scaled = [eta * e.to_optimum.mean() for e in path]
        left.semilogy(at, scaled, "x--", label=r"$\eta\,\mathrm{KL}(\pi\,\|\,\pi^*)$")
        error = [max(np.abs(e.gap - eta * e.to_optimum).max(), 1e-17) for e in path]
        left.semilogy(at, error, "k:", label="largest difference")
        left.legend()
    left.set(xlabel="evaluation along DPO's fit", ylabel="nats of reward", title="Identity L0")
    for name, found in paths.items():
        gaps = np.array([p.gap for p in found])
        spread = gaps.std(0, ddof=1) / np.sqrt(len(gaps)) if len(gaps) > 1 else None
        middle.errorbar(found[0].labels, gaps.mean(0), spread, marker="o", label=name)
    if paths:
        middle.legend()
    middle.set(xlabel="labels", ylabel=r"exact $J(\pi^*) - J(\pi)$", title="The same labels")
    middle.set_yscale("log")
    chains = {
        int(name.split("/")[1].split()[0]): metric
        for name, metric in metrics.items()
        if name.startswith("rejection/") and " step" in name and name.endswith("/total_variation")
    }
    if chains:
        right.errorbar(
            list(chains), [m.value for m in chains.values()],
            [m.stderr or 0.0 for m in chains.values()], marker="o",
        )  # fmt: skip
    right.set(
        xlabel="rejection steps", ylabel=r"total variation to $\pi^*$", title="The same proposals"
    )
    for ax in (left, right):  # evaluations and steps are counted
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    plotting.save(figure, target)


cli = study.entry(main, Config, __doc__)
