"""The one style of figures: ticks that do not lie on each other, a legend with each name once."""

import doctest
import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import plotting
from jax_klrlhf import figures


def boxes(ax, axis):
    """Extents of the labels of an axis, as drawn, in pixels along it."""
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    low, high = sorted(axis.get_view_interval())
    found = [
        label.get_window_extent(renderer)
        for minor in (False, True)
        for place, label in zip(
            axis.get_ticklocs(minor=minor), axis.get_ticklabels(minor), strict=True
        )
        if label.get_text() and low <= place <= high
    ]
    along = "x" if axis is ax.xaxis else "y"
    return sorted((getattr(box, f"{along}0"), getattr(box, f"{along}1")) for box in found)


def overlaps(spans):
    return any(b[0] < a[1] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("high", [13.0, 30.0, 48.0, 384.0, 1e4, 1e9])
def test_labels_of_a_logarithmic_axis_do_not_overlap_and_are_at_least_two(high):
    figure, axes = plotting.grid(1, 1, width=2.6)
    ax = axes[0, 0]
    ax.plot([11.0, high], [11.0, high])
    plotting.label(ax, x="x", y="y", log="xy")
    figures.tidy(figure)
    for axis in (ax.xaxis, ax.yaxis):
        spans = boxes(ax, axis)
        assert 2 <= len(spans) <= 8
        assert not overlaps(spans)


def test_without_it_matplotlib_writes_one_over_the_other():
    _, axes = plotting.grid(1, 1, width=2.0)  # a panel of three in a column
    axes[0, 0].plot([11.0, 48.0], [11.0, 48.0])
    plotting.label(axes[0, 0], x="x", y="y", log="x")
    assert overlaps(boxes(axes[0, 0], axes[0, 0].xaxis))


def test_ticks_are_round_and_inside():
    rng = np.random.default_rng(0)
    for low, ratio in zip(
        10 ** rng.uniform(-9, 9, 200), 10 ** rng.uniform(0.02, 8, 200), strict=True
    ):
        found = figures.ticks(low, low * ratio)
        assert 1 <= len(found) <= 9, (low, ratio, found)
        assert found == sorted(set(found))
        assert low * (1 - 1e-8) <= found[0] <= found[-1] <= low * ratio * (1 + 1e-8)
        assert len(found) > 1, (low, ratio)
    assert doctest.testmod(figures).failed == 0


def test_a_figure_is_saved_for_the_page_and_for_paper_and_is_the_same_file_again(tmp_path):
    def draw(name):
        figure, axes = plotting.grid(1, 2)
        for ax in axes[0]:
            ax.plot([1, 2], [1, 3], label="ours")
            plotting.band(ax, [1, 2], np.ones((3, 2)), label="theirs")
        plotting.legend(figure)
        plotting.save(figure, tmp_path / f"{name}.png")
        return figure

    figure = draw("one")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "theirs"]
    draw("two")
    pdf = [(tmp_path / f"{name}.pdf").read_bytes() for name in ("one", "two")]
    assert pdf[0][:5] == b"%PDF-"
    assert pdf[0] == pdf[1]


def test_the_style_holds_of_every_figure_and_its_text_is_not_too_small():
    assert isinstance(plotting.grid(1, 1)[0], Figure)
    for name, value in matplotlib.RcParams(figures.STYLE).items():
        assert matplotlib.rcParams[name] == value, name
    texts = ("font.size", "titlesize", "labelsize", "fontsize")
    sizes = [value for name, value in figures.STYLE.items() if name.endswith(texts)]
    assert len(sizes) == 6
    assert min(sizes) >= 7.5
