"""The figure: gaps and bounds over n, d and B, the error, and the coverage of the set."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments import plotting
from experiments.rates.measure import Config, Measured
from experiments.rates.report import NAMES, SHRUNK, held, pessimist
from jax_klrlhf import results


def figure(
    config: Config,
    base: Measured,
    by_dim: Mapping[int, Measured],
    by_bound: Mapping[float, Measured],
    target: Path,
) -> None:
    middle = config.deltas.index(config.delta)
    drawn, axes = plotting.grid(2, 3)
    n, last = list(config.comparisons), config.comparisons[-1]

    def draw(ax, x, pick) -> None:
        plotting.band(ax, x, pick(lambda m: m.greedy), label="gap, greedy", color="C0")
        for name, color in (("one", "C1"), ("two", "C2")):
            p = lambda m, k=name: pessimist(m, k, middle)  # noqa: E731
            plotting.band(
                ax, x, pick(lambda m, p=p: p(m).gap), label=f"gap, {NAMES[name]}", color=color
            )
            plotting.band(
                ax,
                x,
                pick(lambda m, p=p: p(m).bound),
                label=f"bound, {NAMES[name]}",
                color=color,
                linestyle="--",
            )

    draw(axes[0, 0], n, lambda of: of(base))
    plotting.guide(axes[0, 0], n, float(base.greedy[:, 0].mean()), -1.0, label="slope -1")
    bound = float(pessimist(base, "two", middle).bound[:, 0].mean())
    plotting.guide(axes[0, 0], n, bound, -0.5, label="slope -1/2")
    plotting.label(axes[0, 0], x="comparisons n", y="reward", title="gap and bounds", log="xy")
    stack = lambda panels: lambda of: np.stack([of(m)[:, -1] for m in panels.values()], 1)  # noqa: E731
    draw(axes[0, 1], list(by_dim), stack(by_dim))
    plotting.label(axes[0, 1], x="dimension d", y="reward", title=f"n = {last}", log="xy")
    draw(axes[0, 2], list(by_bound), stack(by_bound))
    plotting.label(axes[0, 2], x="bound B", y="reward", title=f"n = {last}", log="y")
    for name, color in (("one_realized", "C1"), ("two_realized", "C2")):
        p = getattr(base, name)
        plotting.band(axes[1, 0], n, p.gap, label=f"gap, {NAMES[name]}", color=color)
        plotting.band(
            axes[1, 0], n, p.bound, label=f"bound, {NAMES[name]}", color=color, linestyle="--"
        )
    plotting.label(axes[1, 0], x="comparisons n", y="reward", title="least radius", log="xy")
    for dim, measured in by_dim.items():
        quantile = np.quantile(measured.error, 1 - config.delta, axis=0)
        axes[1, 1].plot(n, quantile / np.sqrt(dim), label=f"d = {dim}")
    plotting.label(
        axes[1, 1],
        x="comparisons n",
        y="error / sqrt d",
        title=f"{1 - config.delta:g}-quantile of the error in Sigma-norm",
        log="x",
    )
    for bound, measured in by_bound.items():
        shares = [results.proportion(held(measured, -1, middle, f)) for f in SHRUNK]
        middles = np.array([share.value for share, _ in shares])
        ends = np.array([interval for _, interval in shares])
        axes[1, 2].errorbar(
            np.array(SHRUNK) * config.constant,
            middles,
            np.abs(ends.T - middles),
            marker=".",
            capsize=2,
            label=f"B = {bound:g}",
        )
    axes[1, 2].axhline(1 - config.delta, linestyle=":", color="0.4", label="asked")
    plotting.label(
        axes[1, 2],
        x="constant C of the radius",
        y="covered (Wilson 95 %)",
        title=f"confidence set at n = {last}",
        log="x",
    )
    for ax in axes.ravel():
        ax.legend()
    plotting.save(drawn, target)
