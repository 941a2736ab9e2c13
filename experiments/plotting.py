"""What the experiments' figures share: bands over seeds, log-log slopes with intervals, saving.

Their style is :data:`jax_klrlhf.figures.STYLE`, which the notebooks have too; importing this module
sets it. Axes: ``seeds`` (independent repetitions), ``points`` (of the horizontal axis).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from jax_klrlhf import figures
from jax_klrlhf.results import Metric

_settings: Any = matplotlib.rcParams  # whose stubs know its keys one by one
_settings.update(figures.STYLE)
MARKERS = "os^vDP"
"""Of methods beyond the ten colours."""


def grid(
    rows: int, columns: int, *, width: float = figures.WIDTH, height: float = 0.8 * figures.WIDTH
):
    """A figure and its axes ``[rows, columns]``, without pyplot's global state."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def band(
    ax: Axes,
    x: ArrayLike,
    values: Float[np.ndarray, "seeds points"],
    *,
    label: str,
    positive: bool = True,
    **style,
) -> None:
    """The mean over seeds with its 95 % band (1.96 standard errors).

    ``positive`` keeps the band above a tenth of the mean, which a logarithmic axis needs.
    """
    values = np.asarray(values, np.float64)
    mean = values.mean(0)
    half = 1.96 * values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0 * mean
    (line,) = ax.plot(x, mean, label=label, **style)
    low = np.maximum(mean - half, 0.1 * mean) if positive else mean - half
    ax.fill_between(np.asarray(x), low, mean + half, color=line.get_color(), alpha=0.2, linewidth=0)


def log_slope(
    x: Sequence[float],
    values: Float[np.ndarray, "seeds points"],
    *,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[Metric, tuple[float, float]]:
    """Least-squares slope of log(mean over seeds) in log x, and its interval.

    The interval is the percentile bootstrap over seeds: points of one seed may depend on each
    other (nested data). ``stderr`` is the bootstrap's deviation. ValueError where fewer than two
    points are given, or a mean is not positive and so has no logarithm.
    """
    values = np.asarray(values, np.float64)
    if len(x) < 2 or values.ndim != 2 or values.shape[1] != len(x):
        raise ValueError(f"log_slope: {len(x)} points against values {values.shape}.")
    if not (values.mean(0) > 0).all():
        raise ValueError("log_slope: a mean is not positive; drop that point.")
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    centred = np.log(np.asarray(x, np.float64))
    centred = centred - centred.mean()
    means = np.concatenate([values.mean(0)[None], values[draws].mean(1)])
    # A resample of a few seeds may have a zero mean; its logarithm is kept finite.
    slopes = np.log(np.maximum(means, np.finfo(float).tiny)) @ centred / (centred @ centred)
    low, high = np.quantile(slopes[1:], [(1 - level) / 2, (1 + level) / 2])
    return (
        Metric(float(slopes[0]), float(slopes[1:].std(ddof=1)), len(values)),
        (float(low), float(high)),
    )


def guide(ax: Axes, x: Sequence[float], start: float, slope: float, *, label: str) -> None:
    """A dotted line of the given log-log slope through (x[0], start)."""
    points = np.asarray(x, np.float64)
    ax.plot(points, start * (points / points[0]) ** slope, ":", color="0.4", label=label)


def label(ax: Axes, *, x: str, y: str, title: str = "", log: str = "") -> None:
    """Axis labels, title, and which of the axes (``"x"``, ``"y"``, ``"xy"``) are logarithmic."""
    ax.set(xlabel=x, ylabel=y, title=title)
    if "x" in log:
        ax.set_xscale("log")
    if "y" in log:
        ax.set_yscale("log")


def legend(figure: Figure, *, columns: int = 3) -> None:
    """One legend for all panels, under them: each name once."""
    named = {}
    for ax in figure.axes:
        handles, names = ax.get_legend_handles_labels()
        named |= dict(zip(names, handles, strict=True))
    if named:
        figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=columns)


def save(figure: Figure, path: Path) -> None:
    """Write the PNG, and a PDF beside it; ticks of logarithmic axes are set by what is seen."""
    figures.tidy(figure)
    figure.savefig(path)
    # Without a date: the same figure is the same file.
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
