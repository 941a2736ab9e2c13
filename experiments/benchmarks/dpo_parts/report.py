"""Whether all compute the same loss, and the tables."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console

from experiments.benchmarks import paired
from jax_klrlhf import results
from jax_klrlhf.errors import InputError
from jax_klrlhf.results import Metric

AGREEMENT = 1e-3
"""Largest difference of a loss (nats) from ours."""


def agreement(losses: Mapping[str, Sequence[float]]) -> dict[str, Metric]:
    """First and last loss of each, and how far it strays from ours; raises where that is too far.

    Raises too where agreement would say nothing: the reference is not pi0, or nothing moved.
    """
    ours = np.asarray(losses["ours"])
    first, last = float(ours[0]), float(ours[-1])
    if not abs(first - math.log(2)) < AGREEMENT:
        raise InputError(f"the first loss is {first:.5f}, not ln 2: the reference is not pi0")
    if len(ours) > 1 and not abs(first - last) > 10 * AGREEMENT:
        raise InputError(
            f"the loss moved by {abs(first - last):.1e} only in {len(ours)} steps, so agreement "
            "would say nothing: raise --learning-rate"
        )
    metrics = {}
    for name, found in losses.items():
        apart = float(np.abs(np.asarray(found) - ours).max()) if len(found) == len(ours) else np.inf
        if not apart < AGREEMENT:
            raise InputError(
                f"{name} computes another loss: {apart:.1e} apart within {len(ours)} steps, "
                f"allowed {AGREEMENT}; nothing is reported"
            )
        metrics |= {
            f"agreement/{name}/first_loss": Metric(float(found[0])),
            f"agreement/{name}/last_loss": Metric(float(found[-1])),
            f"agreement/{name}/largest_difference": Metric(apart, n=len(ours)),
        }
    return metrics


def stage(
    title: str,
    panel: str,
    times: Mapping[str, paired.Times],
    peaks: Mapping[str, tuple[float, float]],
    work: Mapping[str, Sequence[float]],
    slots: Mapping[str, int],
    *,
    useful: int,
    console: Console,
) -> dict[str, Metric]:
    """Print one stage's table; the metrics of it.

    ``peaks``: MiB in all and while training; ``work``: core-seconds of each turn; ``slots``: token
    positions that a contender computes on for the ``useful`` tokens.
    """
    metrics, rows = {}, {}
    for name, taken in times.items():
        speed = paired.rate(useful, taken)
        ratio = paired.ratio(taken, times["ours"])
        whole, training = peaks[name]
        whole = max(whole, training)
        metrics |= {
            f"{panel}/{name}/tokens_per_second": speed,
            f"{panel}/{name}/ours_is_faster": ratio,
            f"{panel}/{name}/core_seconds": results.mean(work[name]),
            f"{panel}/{name}/slots_per_token": Metric(slots[name] / useful),
            f"{panel}/{name}/peak_mebibytes": Metric(whole),
            f"{panel}/{name}/training_peak_mebibytes": Metric(training),
        }
        rows[name] = {
            "useful tokens/s": _plus_minus(speed, 0),
            "ours is faster": "" if name == "ours" else _plus_minus(ratio, 2),
            "core-seconds": f"{np.mean(work[name]):.1f}",
            "slots per token": f"{slots[name] / useful:.2f}",
            "peak MiB": f"{whole:,.0f}",
            "while training": f"{training:,.0f}",
        }
    results.print_table(title, rows, console=console)
    return metrics


def at_best(
    found: Mapping[str, Mapping[str, Mapping[str, paired.Times]]], useful: int, console: Console
) -> dict[str, Metric]:
    """Every contender under the setting that suits it best, against ours under its own."""
    metrics, rows = {}, {}
    for part, by_setting in found.items():
        names = dict.fromkeys(name for times in by_setting.values() for name in times)
        best = {}
        for name in names:
            # Those that trade speed for memory take part under the first setting alone.
            rates = {
                setting: paired.rate(useful, times[name])
                for setting, times in by_setting.items()
                if name in times
            }
            setting = max(rates, key=lambda s: rates[s].value)
            best[name] = setting, rates[setting]
        for name, (setting, speed) in best.items():
            ratio = _quotient(best["ours"][1], speed)
            metrics[f"best {part}/{name}/tokens_per_second"] = speed
            metrics[f"best {part}/{name}/ours_is_faster"] = ratio
            rows[f"{name}, reference {part}"] = {
                "allocator": setting,
                "useful tokens/s": _plus_minus(speed, 0),
                "ours is faster": "" if name == "ours" else _plus_minus(ratio, 2),
            }
    if rows:
        results.print_table("each at its best allocator setting", rows, console=console)
    return metrics


def _quotient(first: Metric, second: Metric) -> Metric:
    """Ratio of independent means, its error to first order."""
    value = first.value / second.value
    if first.stderr is None or second.stderr is None:
        return Metric(value)
    spread = math.hypot(first.stderr / first.value, second.stderr / second.value)
    return Metric(value, value * spread, first.n)


def _plus_minus(metric: Metric, digits: int) -> str:
    text = f"{metric.value:,.{digits}f}"
    return text if metric.stderr is None else f"{text} ± {metric.stderr:,.{digits}f}"
