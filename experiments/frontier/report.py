"""From cells to results: the table, the paper's statements, the figures, one HTML file."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import plotting
from experiments.frontier import statements
from experiments.frontier.cells import BEST_OF, PI0, Found, Name
from experiments.frontier.evaluate import Judged
from experiments.frontier.statements import Curve, Finding
from jax_klrlhf import figures as style
from jax_klrlhf.results import Metric, mean

Cells = Mapping[Name, Found]
COLUMNS = {
    "gold": "gold reward",
    "gold_gain": "gain over pi0",
    "kl": "KL(pi||pi0)",
    "wins": "win rate",
    "length": "tokens",
    "entropy": "entropy",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "proxy_gain": "proxy gain",
}
ONLINE, HYBRID = "online GSHF-DPO", "hybrid GSHF-DPO"
BASELINES = ("offline DPO", "RSO")


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
    last = [f.rounds[-1] for f in found if f.rounds]
    shared = set.intersection(*(set(r) for r in last)) if last else set()
    if method == PI0:
        # By definition; two draws of it differ by chance.
        inside["gold_gain"] = outside["gold_gain"] = Metric(0.0)
    return Row(
        method,
        coefficient,
        inside,
        outside,
        _minus(inside["gold"], outside["gold"]),
        _minus(inside["gold_gain"], outside["gold_gain"]),
        statements.pooled([f.held_out.proxy_gain - f.held_out.gold_gain for f in found]),
        {name: mean([r[name].value for r in last]) for name in sorted(shared)},
    )


def _minus(one: Metric, two: Metric) -> Metric:
    """Of independent prompts."""
    return Metric(
        one.value - two.value, float(np.hypot(one.stderr or 0.0, two.stderr or 0.0)), one.n
    )


def findings(cells: Cells) -> list[Finding]:
    """The paper's statements, as far as their methods were run at a seed that both have whole."""
    present = {name.method for name in cells}
    pairs = [
        *((f"{b} above {w}", b, w) for b in (ONLINE, HYBRID) for w in BASELINES),
        ("multi-step RSO above RSO", "multi-step RSO", "RSO"),
        ("offline GSHF above offline DPO", "offline GSHF", "offline DPO"),
        ("best and worst of n above enhancer", ONLINE, "online GSHF-DPO, enhancer"),
        ("fixed above moving reference", ONLINE, "moving reference"),
    ]
    found = []
    for text, better, worse in pairs:
        seeds = _seeds(cells, better, worse) if {better, worse} <= present else []
        if seeds:
            found.append(
                statements.compare(
                    f"{text}, at equal KL",
                    *([_curve(cells, m, s, _gain) for s in seeds] for m in (better, worse)),
                )
            )
    for better in (ONLINE, HYBRID):
        for worse in BASELINES:
            seeds = _seeds(cells, better, worse) if {better, worse} <= present else []
            if seeds:
                found.append(
                    statements.compare(
                        f"{better} loses less out of distribution than {worse}, at equal KL",
                        *([_curve(cells, m, s, _loss) for s in seeds] for m in (better, worse)),
                    )
                )
    return found


def _seeds(cells: Cells, *methods: str) -> list[int]:
    """Those at which each method has all of its coefficients: a frontier cut short is another."""
    have = {method: {n[1:] for n in cells if n.method == method} for method in methods}
    return [
        seed
        for seed in sorted({name.seed for name in cells})
        if all((c, seed) in found for found in have.values() for c, _ in found)
    ]


def _curve(
    cells: Cells, method: str, seed: int, of: Callable[[list[Found]], tuple[Any, Any]]
) -> Curve:
    """pi0 has drawn with the keys of the method: what its draw has of luck, theirs have too."""
    found = [f for n, f in cells.items() if n.method in (PI0, method) and n.seed == seed]
    return Curve(np.array([f.held_out.kl for f in found]), *of(found))


def _gain(found: list[Found]) -> tuple[np.ndarray, None]:
    return np.array([f.held_out.gold_gain for f in found]), None


def _loss(found: list[Found]) -> tuple[np.ndarray, np.ndarray]:
    """Minus the loss of gain, (in - out), so that more is better."""
    inside, outside = ([-getattr(f, at).gold_gain for f in found] for at in ("held_out", "ood"))
    return np.array(inside), np.array(outside)


def metrics(rows: Sequence[Row], found: Sequence[Finding], cells: Cells) -> dict[str, Metric]:
    """The flat map of ``results.json``."""
    flat: dict[str, Metric] = {}
    for row in rows:
        flat |= {f"held-out/{row.name}/{name}": m for name, m in row.held_out.items()}
        flat |= {f"ood/{row.name}/{name}": m for name, m in row.ood.items()}
        flat |= {
            f"ood/{row.name}/difference": row.difference,
            f"ood/{row.name}/loss": row.loss,
            f"held-out/{row.name}/overoptimization": row.over,
        }
        flat |= {f"rounds/{row.name}/{name.replace('/', '_')}": m for name, m in row.rounds.items()}
    for finding in found:
        flat[f"statement/{finding.statement}/difference"] = finding.difference
        flat[f"statement/{finding.statement}/low"] = Metric(finding.low)
        flat[f"statement/{finding.statement}/high"] = Metric(finding.high)
    flat["proxy/offline/agreement"] = mean(
        [f.agreement for name, f in cells.items() if name.method == PI0]
    )
    return flat


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


def write_html(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    rows: Sequence[Row],
    found: Sequence[Finding],
    drawn: Mapping[str, Figure],
) -> None:
    """One file with everything in it: no other file, script or address is read."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    images = {name: base64.b64encode(png(figure)).decode() for name, figure in drawn.items()}
    path.write_text(
        environment.get_template("report.html.j2").render(
            title=title, facts=facts, rows=rows, columns=COLUMNS, findings=found, images=images
        ),
        encoding="utf-8",
    )


def png(figure: Figure) -> bytes:
    """The figure's PNG file."""
    found = io.BytesIO()
    style.tidy(figure)
    figure.savefig(found, format="png")
    return found.getvalue()
