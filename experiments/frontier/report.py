"""From cells to results: the paper's statements, the tables, the figures, one HTML file."""

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from experiments import plotting
from experiments.frontier import figures, statements
from experiments.frontier.cells import PI0, Found
from experiments.frontier.rows import COLUMNS, Cells, Row, table
from experiments.frontier.statements import Curve, Finding
from experiments.frontier.world import Place
from experiments.study import Study
from jax_klrlhf import results
from jax_klrlhf.results import Metric, mean

ONLINE, HYBRID = "online GSHF-DPO", "hybrid GSHF-DPO"
SELECTED = "offline DPO, best and worst"
BASELINES = ("offline DPO", SELECTED, "RSO")


def findings(cells: Cells) -> list[Finding]:
    """The paper's statements, as far as their methods were run at a seed that both have whole."""
    present = {name.method for name in cells}
    claims = [
        *((f"{b} above {w}", b, w) for b in (ONLINE, HYBRID) for w in BASELINES),
        (f"{SELECTED} above offline DPO", SELECTED, "offline DPO"),
        ("multi-step RSO above RSO", "multi-step RSO", "RSO"),
        ("offline GSHF above offline DPO", "offline GSHF", "offline DPO"),
        ("best and worst of n above enhancer", ONLINE, "online GSHF-DPO, enhancer"),
        ("fixed above moving reference", ONLINE, "moving reference"),
    ]
    judged = all(np.isfinite(f.held_out.second_gain).all() for f in cells.values())
    found = []

    def compare(text: str, better: str, worse: str, of: Callable[[list[Found]], Any]) -> None:
        seeds = _seeds(cells, better, worse) if {better, worse} <= present else []
        if seeds:
            curves = ([_curve(cells, m, s, of) for s in seeds] for m in (better, worse))
            found.append(statements.compare(f"{text}, at equal KL", *curves))

    for text, better, worse in claims:
        compare(text, better, worse, _gain)
    for text, better, worse in claims if judged else ():
        compare(f"{text} by the second judge", better, worse, _second)
    for better in (ONLINE, HYBRID):
        for worse in BASELINES:
            text = f"{better} loses less out of distribution than {worse}"
            compare(text, better, worse, _loss)
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
    """The method's policies alone: no line is drawn from pi0 to the first of them."""
    found = [f for n, f in cells.items() if n.method == method and n.seed == seed]
    return Curve(np.array([f.held_out.kl for f in found]), *of(found))


def _gain(found: list[Found]) -> tuple[np.ndarray, None]:
    return np.array([f.held_out.gold_gain for f in found]), None


def _second(found: list[Found]) -> tuple[np.ndarray, None]:
    return np.array([f.held_out.second_gain for f in found]), None


def _loss(found: list[Found]) -> tuple[np.ndarray, np.ndarray]:
    """Minus the loss of gain, (in - out), so that more is better."""
    inside, outside = ([-getattr(f, at).gold_gain for f in found] for at in ("held_out", "ood"))
    return np.array(inside), np.array(outside)


def metrics(
    rows: Sequence[Row], found: Sequence[Finding], cells: Cells, place: Place
) -> dict[str, Metric]:
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
        if row.rate is not None:
            flat[f"rounds/{row.name}/learning_rate"] = Metric(row.rate)
        flat |= {f"rounds/{row.name}/{name.replace('/', '_')}": m for name, m in row.rounds.items()}
    for finding in found:
        if not finding.compared:
            continue
        flat[f"statement/{finding.statement}/difference"] = finding.difference
        flat[f"statement/{finding.statement}/from KL"] = Metric(finding.from_kl)
        flat[f"statement/{finding.statement}/to KL"] = Metric(finding.shared_kl)
        flat[f"statement/{finding.statement}/low"] = Metric(finding.low)
        flat[f"statement/{finding.statement}/high"] = Metric(finding.high)
    flat["proxy/offline/agreement"] = mean(
        [f.agreement for name, f in cells.items() if name.method == PI0]
    )
    for name, share in zip(("gold", "second"), place.accuracy or (), strict=False):
        flat[f"judges/{name}/accuracy on the other's sentences"] = Metric(share)
    return flat


def write(here: Study, place: Place, found: Cells) -> tuple[list[Row], list[Finding]]:
    """Results, figures and page of the cells there are."""
    config, output = here.config, here.output
    rows, said = table(found), findings(found)
    drawn = figures.figures(rows)
    for name, figure in drawn.items():
        plotting.save(figure, output / f"{name}.png")
    seconds = sum(cell.seconds for cell in found.values())
    seeds = sorted({name.seed for name in found})
    write_html(
        output / "report.html",
        title=f"Reward-KL frontiers: {place.world.name}",
        facts={
            "seeds": str(len(seeds)),
            "cells": str(len(found)),
            "labels of every method": str(config.sizes.labels),
            "prompts": f"{config.sizes.train_prompts} to learn on, "
            f"{config.sizes.held_out_prompts} held out, {config.sizes.held_out_prompts} others",
            "kl_coef": ", ".join(f"{c:g}" for c in config.coefficients),
            "kl_coef of RSO": ", ".join(f"{c:g}" for c in config.rejection_coefficients),
            "labels of RSO's pairs": config.rejection_labels,
            "minutes in cells": f"{seconds / 60:.1f}",
        },
        rows=rows,
        found=said,
        drawn=drawn,
    )
    here.write(metrics(rows, said, found, place), seeds=seeds)
    return rows, said


def show(here: Study, place: Place, rows: Sequence[Row], said: Sequence[Finding]) -> None:
    """Print both tables."""
    config, console = here.config, here.console
    results.print_table(
        f"Frontier: {place.world.name}, {config.seeds} seeds, {config.sizes.labels} labels each",
        {
            row.name: {
                "KL": row.held_out["kl"],
                "gold": row.held_out["gold"],
                "second judge's gain": row.held_out.get("second_gain", ""),
                "held-out - other": row.difference,
                "win rate": row.held_out["wins"],
                "proxy - gold": row.over,
            }
            for row in rows
        },
        console=console,
        caption="± one standard error: over seeds, or over prompts where that is larger; the rest "
        "is in report.html",
    )
    results.print_table(
        "What the paper expects",
        {
            f.statement: {
                "difference": f.difference if f.compared else "",
                "95 % interval": f"[{f.low:.3f}, {f.high:.3f}]" if f.compared else "",
                "at KL": f"{f.from_kl:.2f} to {f.shared_kl:.2f}" if f.compared else "",
                "": f"{f.verdict}: {f.reason}" if f.reason else f.verdict,
            }
            for f in said
        },
        console=console,
    )


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
    images = {
        name: base64.b64encode(figures.png(figure)).decode() for name, figure in drawn.items()
    }
    path.write_text(
        environment.get_template("report.html.j2").render(
            title=title, facts=facts, rows=rows, columns=COLUMNS, findings=found, images=images
        ),
        encoding="utf-8",
    )
