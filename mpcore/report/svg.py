"""Plots as SVG text to be put into a page: always the same bytes for the same data."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

#: Near Okabe and Ito's palette, which colour-blind readers can tell apart; its light colours are
#: darker here, so that each line has a contrast of 3:1 or more to white (WCAG 2.2, 1.4.11).
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#C2629B", "#B97F00", "#00939F", "#8F8000")
#: With the colours: one of the two tells curves that cross apart.
DASHES = ("-", "-", "--", "-.", ":", "-", "--", "-.")
_SIZE = (4.6, 3.2)  # inches: text stays readable on a phone, where the page shrinks it
_LINE = 0.17  # of a legend
Row = tuple[str | float | None, ...]
Data = tuple[tuple[str, ...], tuple[Row, ...]]
_HUGE = 1e300  # beyond, axes have no numbers left for their ticks


def new_axes(x_label: str, y_label: str, *, height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    """Returns an empty plot.

    Args:
        x_label: Below it.
        y_label: At its left.
        height: In inches; it is 4.6 wide. A legend comes on top.
    """
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)
    return figure, axes


class Plot(str):
    """An `<svg>` element, and the numbers that it shows.

    Attributes:
        data: Names of columns, and rows of numbers below them; the first column is that of places.
    """

    data: Data

    def __new__(cls, svg: str, data: Data) -> Plot:
        """Makes a plot of an `<svg>` element and its numbers."""
        plot = super().__new__(cls, svg)
        plot.data = data
        return plot


def data_of(axes: Axes) -> Data:
    """Returns what labelled lines and bars of a plot show, joined by their places.

    Example:
        >>> _, axes = new_axes("step", "loss")
        >>> line = axes.plot([1, 2], [0.5, 0.25], label="run")
        >>> data_of(axes)
        (('step', 'run'), ((1.0, 0.5), (2.0, 0.25)))
    """
    series: list[tuple[str, dict[float, float]]] = []
    for line in axes.get_lines():
        label = str(line.get_label())
        xs, ys = (np.asarray(one, dtype=np.float64).tolist() for one in line.get_data())
        if xs and not label.startswith("_"):
            series.append((plain(label), dict(zip(xs, ys, strict=True))))
    for bars in axes.containers:
        label = str(bars.get_label())
        if isinstance(bars, BarContainer) and not label.startswith("_"):
            heights = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in bars}
            series.append((plain(label), heights))
    places = sorted({place for _, values in series for place in values})
    rows = tuple((place, *(values.get(place) for _, values in series)) for place in places)
    return (axes.get_xlabel() or "place", *(label for label, _ in series)), rows


def to_svg(
    figure: Figure,
    description: str,
    name: str,
    order: Sequence[str] = (),
    data: Data | None = None,
) -> Plot:
    """Adds a legend and returns an `<svg>` element: no prolog, no metadata.

    Args:
        figure: What to render.
        description: Read out by screen readers.
        name: Salt of the element ids, which must differ between the figures of a page.
        order: Labels in the order of the legend; without it, that of drawing.
        data: The numbers, where the plot's lines do not tell them.
    """
    shown = data_of(figure.axes[0]) if data is None else data
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if order:
        pairs = sorted(zip(handles, labels, strict=True), key=lambda pair: order.index(pair[1]))
        handles = [handle for handle, _ in pairs]
    if handles:
        figure.set_figheight(figure.get_figheight() + _LINE * -(-len(handles) // 2))
        figure.legend(
            handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False
        )
    text = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # ids that are not hashed, such as axes_1, would repeat from figure to figure
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", svg, count=2)
    label = html.escape(description)
    return Plot(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1), shown)


def smooth(values: ArrayLike) -> NDArray[np.float64]:
    """Averages each value with those before it, over a twentieth of the run at most.

    What is not finite stays what it is and counts in no average.

    Example:
        >>> smooth([1.0, 3.0]).tolist()
        [1.0, 3.0]
        >>> smooth(np.arange(40.0))[-1].item()
        38.5
    """
    data = np.asarray(values, dtype=np.float64)
    known = np.isfinite(data)
    width = max(1, len(data) // 20)
    smoothed: NDArray[np.float64] = data.copy()
    # each window by itself: a running sum would never forget a loss of 1e20
    for i in np.flatnonzero(known):
        here = slice(max(0, i + 1 - width), i + 1)
        smoothed[i] = data[here][known[here]].mean()
    return smoothed


def thinned(
    steps: ArrayLike, values: ArrayLike, count: int = 1000
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns a curve of at most so many points: means of neighbours, at the last of their steps.

    What is not finite, or as good as that, counts in no mean and is not shown.

    Example:
        >>> thinned(range(6), [1.0, 3.0, 2.0, 4.0, 5.0, 5.0], count=3)
        (array([1., 3., 5.]), array([2., 3., 5.]))
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    y = np.where(np.abs(y) < _HUGE, y, np.nan)
    if len(x) <= count:
        return x, y
    ends = np.linspace(0, len(x), count + 1).round().astype(int)
    parts = [y[a:b][np.isfinite(y[a:b])] for a, b in pairwise(ends)]
    means = [part.mean() if len(part) else np.nan for part in parts]
    return x[ends[1:] - 1], np.asarray(means)


def smooth_curve(
    steps: ArrayLike, values: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns a curve thinned, and then smoothed: each of its points costs a window."""
    places, means = thinned(steps, values)
    return places, smooth(means)


def corners(steps: ArrayLike, values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the points of a curve of steps at which it changes, before and after; and its ends.

    Example:
        >>> corners(range(5), [8.0, 8.0, 8.0, 4.0, 4.0])
        (array([0., 2., 3., 4.]), array([8., 8., 4., 4.]))
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if not len(x):
        return x, y
    moved = np.flatnonzero(y[1:] != y[:-1])
    places = np.unique(np.concatenate(([0, len(x) - 1], moved, moved + 1)))
    return x[places], y[places]


def clipped(name: str, length: int = 30) -> str:
    """Returns a name that fits a plot: of a long one the end, which tells names apart.

    Example:
        >>> clipped("runs/2026/first.jsonl", length=12)
        '...rst.jsonl'
    """
    name = name.encode("utf-8", "replace").decode()  # of files that are named in other codes
    short = name if len(name) <= length else "..." + name[3 - length :]
    # to Matplotlib a dollar begins a formula, which `plain` takes back, and a label with a leading
    # _ is none
    return short.replace("$", r"\$").replace("_", " _", 1 if short.startswith("_") else 0)


def plain(label: str) -> str:
    """Returns the name that `clipped` made a label of, as far as it was not cut.

    Example:
        >>> plain(clipped("costs $5"))
        'costs $5'
    """
    return label.replace(r"\$", "$")
