"""One style for every figure: readable at a column's width, told apart without colour vision.

``STYLE`` are settings of matplotlib, which this library does not need and does not import::

    plt.rcParams.update(figures.STYLE)
    figure, axes = plt.subplots(layout="constrained")
    ...
    figures.tidy(figure)
"""

import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00",
    "#56B4E9", "#882255", "#555555", "#999933", "#332288",
)  # fmt: skip
"""Told apart by people with any colour vision (Okabe and Ito's, with four of Tol's)."""

WIDTH = 3.4
"""Inches of a panel: a column of two."""

STYLE: dict[str, Any] = {
    "figure.figsize": (1.3 * WIDTH, 0.9 * WIDTH),
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "errorbar.capsize": 2,
    "pdf.fonttype": 42,  # text that an editor can change
    "svg.hashsalt": "jax_klrlhf",  # the same figure is the same file
}


def explore(draw: Callable[..., Any], **ranges: tuple[float, float, float]) -> None:
    """``draw`` under sliders, in a notebook with ipywidgets (Colab has them); else drawn once.

    Args:
        draw: called with numbers by name, it shows a picture; what it returns is not looked at.
        ranges: for each name where to begin, the least and the greatest; logarithmic sliders.

    Raises:
        ValueError: for a range that is none.
    """
    for name, (start, low, high) in ranges.items():
        if not 0 < low <= start <= high:
            raise ValueError(f"explore: {name} is not 0 < {low} <= {start} <= {high}.")
    try:
        ipywidgets: Any = importlib.import_module("ipywidgets")
    except ImportError:
        draw(**{name: start for name, (start, _, _) in ranges.items()})
        return
    sliders = {
        name: ipywidgets.FloatLogSlider(
            start, min=math.log10(low), max=math.log10(high), description=name,
            continuous_update=False,
        )
        for name, (start, low, high) in ranges.items()
    }  # fmt: skip

    def show(**values: float) -> None:
        draw(**values)  # what it returns would be printed

    ipywidgets.interact(show, **sliders)


def tidy(figure: Any) -> None:
    """Ticks of logarithmic axes by what is seen: no two labels on each other, none missing.

    matplotlib labels the minor ticks of a short logarithmic axis one over the other
    (``2x10^1 3x10^1 4x10^1``) and leaves others with a single label. Call it when everything is
    drawn.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() != "log":
                continue
            if isinstance(axis.get_major_locator(), FixedLocator):
                continue  # chosen by whoever drew it
            low, high = sorted(axis.get_view_interval())
            axis.set_major_locator(FixedLocator(ticks(low, high)))
            axis.set_major_formatter(FuncFormatter(lambda x, _: plain(x)))
            axis.set_minor_locator(LogLocator(subs=tuple(range(2, 10)), numticks=200))
            axis.set_minor_formatter(NullFormatter())


def ticks(low: float, high: float) -> list[float]:
    """At most eight round numbers in ``[low, high]``, evenly spread on a logarithmic axis.

    >>> ticks(10.0, 50.0)
    [10.0, 20.0, 30.0, 50.0]
    >>> ticks(0.05, 20.0)
    [0.1, 0.3, 1.0, 3.0, 10.0]
    >>> ticks(3.0, 3.5)  # next to nothing: as on a linear axis
    [3.0, 3.2, 3.4]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if high < 2.2 * low:
        unit = 10.0 ** math.floor(math.log10((high - low) / 2))
        step = unit * max(s for s in (1, 2, 5) if s * unit <= (high - low) / 2)
        count = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        return [float(f"{k * step:.12g}") for k in count]
    for leading in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [
            value
            for power in range(first, last + 1)
            for digit in leading
            if low * (1 - 1e-9) <= (value := float(f"{digit}e{power}")) <= high * (1 + 1e-9)
        ]
        # Neighbours lie at least a sixth of the axis apart.
        apart = min((math.log(b / a) for a, b in itertools.pairwise(found)), default=math.inf)
        if apart >= math.log(high / low) / 6:
            return found
    step = math.ceil(len(found) / 6)
    return found[:: max(step, 1)]


def plain(x: float) -> str:
    """A number of an axis, without ``x10^`` where it is short.

    >>> plain(0.02), plain(20000.0), plain(1e-05)
    ('0.02', '20000', '$10^{-5}$')
    """
    if 1e-3 <= abs(x) < 1e5:
        return f"{x:g}"
    power = math.floor(math.log10(abs(x)) + 1e-9)
    digit = f"{x / 10.0**power:g}"
    return f"$10^{{{power}}}$" if digit == "1" else rf"${digit}\times10^{{{power}}}$"
