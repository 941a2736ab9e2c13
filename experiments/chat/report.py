"""Tables, verdicts, the figure and the page of answers, from the cells there are."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from scipy.stats import t as student

from experiments import plotting
from experiments.chat import cells, human, judges, methods
from jax_klrlhf import report as pages
from jax_klrlhf import results
from jax_klrlhf.results import Metric

if TYPE_CHECKING:
    from experiments.chat.cells import Lab, Name

SHOWN = {
    "kl": "KL", "gold_gain": "gold", "proxy_gain": "proxy", "wins": "wins", "length": "tokens",
    "refusals": "refused", "distinct_2": "pairs",
}  # fmt: skip
"""Columns of the table by metric; the last is the share of distinct pairs of tokens."""
TEN = 10
"""Pairs of answers in ``ten.html``."""
CLAIMS = (
    ("online beats offline at equal labels", methods.ONLINE, methods.OFFLINE),
    ("hybrid beats offline at equal labels", methods.HYBRID, methods.OFFLINE),
    ("hybrid beats online at equal labels", methods.HYBRID, methods.ONLINE),
    ("preferences beat likelihood on the preferred", methods.OFFLINE, methods.SFT),
    ("the worst of an ensemble beats its mean", "RSO, worst", "RSO, mean"),
    ("the posterior's lower bound beats the mean", "RSO, lower bound", "RSO, mean"),
    ("PAR beats the mean", "RSO, PAR", "RSO, mean"),
)
"""Of gold less ``kl_coef`` KL, the objective, at the same coefficient; likelihood has none and is
judged at every one."""

Found = dict["Name", dict[str, Any]]


def write(lab: "Lab", names: Iterable["Name"], output: Path, console: Console) -> dict[str, Metric]:
    """Everything but ``results.json``, whose metrics are returned."""
    found: Found = {name: lab.run(name) for name in names}
    metrics = _accuracy(lab.accuracy(), console)
    metrics |= _rates(lab, console)
    for place in cells.PLACES:
        rows = {}
        for setting in dict.fromkeys(name[:3] for name in found):
            row = _row(lab, *setting)
            measured = {metric: _over(found, *setting, place, metric) for metric in SHOWN}
            rows[row] = {SHOWN[metric]: value for metric, value in measured.items()}
            metrics |= {f"{place}/{row}/{metric}": m for metric, m in measured.items()}
        results.print_table(f"Policies, {place}", rows, console=console, caption=_caption(found))
    metrics |= _curves(found, console)
    metrics |= _verdicts(lab, found, console)
    _figure(found, output / "frontier.png")
    _page(lab, found, output)
    return metrics


def _row(lab: "Lab", method: str, coefficient: float, rate: float) -> str:
    """A method's name in tables; the learning rate where it is not the chosen one."""
    said = [method] + [f"{coefficient:g}"] * (coefficient > 0)
    other = rate and rate != lab.rates[methods.METHODS[method].objective]
    return ", ".join(said + [f"rate {rate:g}"] * bool(other))


def verdict(difference: Metric) -> str:
    """By the 95 % interval, Student's t: held above 0, not held below it, undecided else."""
    if difference.stderr is None or difference.n is None:
        return "undecided"
    half = float(student.ppf(0.975, difference.n - 1)) * difference.stderr
    if difference.value - half > 0:
        return "held"
    return "not held" if difference.value + half < 0 else "undecided"


def together(values: "list[np.ndarray]") -> Metric:
    """Of per-prompt values by seed: over seeds from three on, else over prompts.

    All seeds are judged on the same prompts, so prompts are averaged over seeds first, or seeds
    over prompts: neither counts an answer as an independent unit.
    """
    table = np.stack(values)
    return results.mean(table.mean(1) if len(table) >= 3 else table.mean(0))


def _caption(found: Found) -> str:
    seeds = len({name.seed for name in found})
    unit = f"over {seeds} seeds" if seeds >= 3 else f"over prompts, {seeds} seed(s)"
    return f"± one standard error {unit}; gains are over pi0; nats"


def _over(
    found: Found, method: str, coefficient: float, rate: float, place: str, metric: str
) -> Metric:
    return together(
        [
            np.asarray(cell[place][metric])
            for name, cell in found.items()
            if name[:3] == (method, coefficient, rate)
        ]
    )


def _rates(lab: "Lab", console: Console) -> dict[str, Metric]:
    """The chosen ones, and the losses they were chosen by."""
    metrics = {f"learning rate/{objective}": Metric(rate) for objective, rate in lab.rates.items()}
    rows: dict[str, Any] = {o: {"chosen": f"{rate:g}"} for o, rate in lab.rates.items()}
    for objective, tried in lab.pilots:
        loss = lab.pilot(objective, tried)
        metrics[f"pilot/{objective}/{tried:g}"] = loss
        rows[objective][f"loss at {tried:g}"] = loss
    results.print_table(
        "Learning rates", rows, console=console,
        caption="of pairs held out of a pilot's fit; ± one standard error over them; nats",
    )  # fmt: skip
    return metrics


def _accuracy(found: dict[str, Any], console: Console) -> dict[str, Metric]:
    metrics, rows = {}, {}
    for key, hits in found.items():
        if key in ("made_of", "seconds"):
            continue
        metric, (low, high) = results.proportion(hits)
        metrics[f"accuracy/{key}"] = metric
        rows[key] = {"accuracy [95 %]": f"{metric.value:.3f} [{low:.3f}, {high:.3f}]"}
        bag = found.get(f"{key}, bag of words")
        if bag is not None:
            gain = results.mean(np.subtract(hits, bag))
            metrics[f"accuracy/{key}/less the bag of words"] = gain
            rows[key] |= {"less the bag of words": gain, "above it": verdict(gain)}
        rows[key]["pairs"] = str(len(hits))
    results.print_table(
        "Accuracy on pairs of people that no one learned from", rows, console=console,
        caption="the difference is paired; ± one standard error over pairs",
    )  # fmt: skip
    return metrics


def _curves(found: Found, console: Console) -> dict[str, Metric]:
    """Over-optimization: the best of n of pi0's answers by each proxy, judged by gold."""
    cell = next(cell for name, cell in found.items() if name.method == cells.PI0)
    metrics, rows = {}, {}
    for key, at in cell["curves"].items():
        place, by, n = key.split("/")
        gain = results.mean(at["gold_gain"])
        metrics[f"best-of-n/{key}/gold_gain"] = gain
        metrics[f"best-of-n/{key}/own_gain"] = results.mean(at["own_gain"])
        rows.setdefault(f"{place}, by {by}", {})[f"n = {n} ({at['kl']:.2f} nats)"] = gain
    results.print_table(
        "Gold of the best of n by each proxy, over pi0", rows, console=console,
        caption="± one standard error over prompts",
    )  # fmt: skip
    return metrics


def _verdicts(lab: "Lab", found: Found, console: Console) -> dict[str, Metric]:
    metrics, rows = {}, {}
    for place in cells.PLACES:
        for said, one, other in CLAIMS:
            at = itertools.product(lab.config.coefficients, _compared(lab, found, one, other))
            for coefficient, (rate, their) in at:
                ours = _objective(found, one, coefficient, rate, place)
                theirs = _objective(found, other, coefficient, their, place)
                both = sorted(ours.keys() & theirs.keys())
                if not both:
                    continue
                difference = together([ours[seed] - theirs[seed] for seed in both])
                key = f"{place}: {said}, kl_coef {coefficient:g}"
                if rate != lab.rates[methods.METHODS[one].objective]:
                    key += f", rate {rate:g}"
                metrics[f"claims/{key}"] = difference
                rows[key] = {"difference": difference, "": verdict(difference)}
    results.print_table(
        "Gold less kl_coef KL, paired by seed and prompt", rows, console=console,
        caption="held, not held or undecided by the 95 % interval, not corrected for their number",
    )  # fmt: skip
    return metrics


def _compared(lab: "Lab", found: Found, one: str, other: str) -> list[tuple[float, float]]:
    """Rates at which two methods are compared: equal ones where they minimize the same, else every
    one of the first against the chosen one of the second."""
    objective, others = (methods.METHODS[method].objective for method in (one, other))
    rates = sorted({name.rate for name in found if name.method == one})
    return [(r, r if objective == others else lab.rates.get(others, 0.0)) for r in rates]


def _objective(
    found: Found, method: str, coefficient: float, rate: float, place: str
) -> dict[int, np.ndarray]:
    own = coefficient if methods.METHODS[method].coefficient else 0.0
    return {
        name.seed: np.asarray(cell[place]["gold"]) - coefficient * np.asarray(cell[place]["kl"])
        for name, cell in found.items()
        if name[:3] == (method, own, rate)
    }


def _figure(found: Found, target: Path) -> None:
    figure, axes = plotting.grid(len(cells.PLACES), 2)
    cell = next(cell for name, cell in found.items() if name.method == cells.PI0)
    for row, place in enumerate(cells.PLACES):
        for column, metric in enumerate(("gold_gain", "proxy_gain")):
            ax = axes[row, column]
            for number, method in enumerate(dict.fromkeys(name.method for name in found)):
                at = {n[:3] for n in found if n.method == method}
                points = sorted(
                    ([_over(found, *s, place, name) for name in ("kl", metric)] for s in at),
                    key=lambda point: point[0].value,
                )
                ax.errorbar(
                    [p[0].value for p in points], [p[1].value for p in points],
                    [1.96 * (p[1].stderr or 0.0) for p in points],
                    marker="o", color=f"C{number}", label=method, linewidth=1,
                )  # fmt: skip
            plotting.label(ax, x="KL to pi0, nats", y=metric.replace("_", " "), title=place)
        for by in (*judges.PROXIES, "gold"):
            curve = {k: v for k, v in cell["curves"].items() if k.startswith(f"{place}/{by}/")}
            axes[row, 0].plot(
                [at["kl"] for at in curve.values()],
                [np.mean(at["gold_gain"]) for at in curve.values()],
                linestyle="--", linewidth=1, label=f"best of n by {by}",
            )  # fmt: skip
    plotting.legend(figure)
    plotting.save(figure, target)


def _page(lab: "Lab", found: Found, output: Path) -> None:
    """All answers of the first seed, and ten pairs: pi0's and online's to the first ten prompts.

    The prompts stand in the order of a shuffle that no policy was there to see, so the ten are
    nobody's choice; all others are on the same page.
    """
    first, least = lab.config.seed, min(lab.config.coefficients)
    kept = {
        _row(lab, name.method, 0.0, name.rate): cell
        for name, cell in found.items()
        if name.seed == first and name.coefficient in (0.0, least)
    }
    records, decode = [], lab.encoder.decode
    for place, prompts in zip(cells.PLACES, lab.places, strict=True):
        for policy, cell in kept.items():
            for answer in cell[f"{place}, answers"]:
                pieces = pages.pieces(decode, answer["ids"])
                records.append(
                    {
                        "prompt": human.words(prompts[answer["prompt"]]),
                        "policy": policy, "text": "".join(pieces), "tokens": pieces,
                        "token_kl": answer["token_kl"], "gold": answer["gold"],
                        "proxy": answer["proxy"], "kl": sum(answer["token_kl"]),
                    }
                )  # fmt: skip
    ten = [human.words(prompt) for prompt in lab.places[0][:TEN]]
    pages.side_by_side(
        records, output / "answers.html", title="Answers",
        note="Judged by gold and by the proxies' mean; colour is the KL of a token, in nats.",
    )  # fmt: skip
    pair = (cells.PI0, methods.ONLINE)
    pages.side_by_side(
        [r for r in records if r["prompt"] in ten and (r["policy"] in pair or len(kept) == 1)],
        output / "ten.html", title="Ten pairs",
        note="pi0 and online, to the first ten held-out prompts of a fixed shuffle.",
    )  # fmt: skip
