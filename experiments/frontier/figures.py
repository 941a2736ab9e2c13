"""The four figures: frontiers, what is believed against what is, manner, acceptance."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import plotting
from experiments.frontier.rows import COLUMNS, Row
from jax_klrlhf import figures as style
from jax_klrlhf.results import Metric


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """By file name."""
    return {
        "frontier": _frontier(rows),
        "proxy": _proxy(rows),
        "manner": _manner(rows),
        "acceptance": _acceptance(rows),
    }


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Each method's rows in the order of their KL; colours follow the order of methods."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.method, []).append(row)
    return {m: sorted(g, key=lambda r: r.held_out["kl"].value) for m, g in found.items()}


def _line(ax: Any, x: Sequence[Metric], y: Sequence[Metric], **style: Any) -> None:
    ax.errorbar(
        [m.value for m in x],
        [m.value for m in y],
        xerr=[m.stderr or 0.0 for m in x],
        yerr=[m.stderr or 0.0 for m in y],
        marker="o",
        **style,
    )


def _frontier(rows: Sequence[Row]) -> Figure:
    figure, axes = plotting.grid(1, 2)
    sides = ((axes[0, 0], "held_out", "Held-out prompts"), (axes[0, 1], "ood", "Other source"))
    for ax, at, title in sides:
        for colour, (method, group) in enumerate(_groups(rows).items()):
            kl, gold = ([getattr(r, at)[f] for r in group] for f in ("kl", "gold"))
            _line(ax, kl, gold, label=method, color=f"C{colour % 10}")
        plotting.label(ax, x=r"KL($\pi\,\|\,\pi_0$), nats", y="gold reward", title=title)
    plotting.legend(figure)
    return figure


def _proxy(rows: Sequence[Row]) -> Figure:
    figure, axes = plotting.grid(1, 2)
    for colour, (method, group) in enumerate(_groups(rows).items()):
        proxy, gold, kl = (
            [r.held_out[f] for r in group] for f in ("proxy_gain", "gold_gain", "kl")
        )
        style = {"label": method, "color": f"C{colour % 10}"}
        _line(axes[0, 0], proxy, gold, **style)
        _line(axes[0, 1], kl, [r.over for r in group], **style)
    low, high = axes[0, 0].get_xlim()
    axes[0, 0].plot([low, high], [low, high], ":", color="0.5")
    plotting.label(axes[0, 0], x="proxy gain", y="gold gain", title="What it believes, what is")
    plotting.label(
        axes[0, 1],
        x=r"KL($\pi\,\|\,\pi_0$), nats",
        y="proxy gain - gold gain",
        title="Over-optimization",
    )
    plotting.legend(figure)
    return figure


def _manner(rows: Sequence[Row]) -> Figure:
    figure, axes = plotting.grid(2, 2)
    shown = ("wins", "length", "entropy", "distinct_2")
    for ax, field in zip(axes.flat, shown, strict=True):
        for colour, (method, group) in enumerate(_groups(rows).items()):
            known = [r for r in group if field in r.held_out]
            if known:
                kl, values = ([r.held_out[f] for r in known] for f in ("kl", field))
                _line(ax, kl, values, label=method, color=f"C{colour % 10}")
        plotting.label(ax, x=r"KL($\pi\,\|\,\pi_0$), nats", y=COLUMNS[field])
    plotting.legend(figure)
    return figure


def _acceptance(rows: Sequence[Row]) -> Figure:
    figure, axes = plotting.grid(1, 1, width=5.6, height=3.2)
    ax = axes[0, 0]
    for colour, row in enumerate(r for r in rows if "rejection/acceptance/1" in r.rounds):
        steps = [n for n in row.rounds if n.startswith("rejection/acceptance/")]
        x = [Metric(float(name.rsplit("/", 1)[1])) for name in steps]
        _line(ax, x, [row.rounds[n] for n in steps], label=row.name, color=f"C{colour % 10}")
    plotting.label(ax, x="step", y="acceptance rate", title="Rejection sampling")
    ax.set_ylim(0, 1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return figure


def png(figure: Figure) -> bytes:
    """The figure's PNG file."""
    found = io.BytesIO()
    style.tidy(figure)
    figure.savefig(found, format="png")
    return found.getvalue()
