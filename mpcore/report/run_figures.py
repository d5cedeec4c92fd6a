"""Plots of runs: losses, the loss scale, exponents of gradients, updates lost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from mpcore.monitoring.findings import HIGHEST, LOWEST
from mpcore.monitoring.reading import Reading
from mpcore.monitoring.run_log import RunLog
from mpcore.monitoring.verdicts import scale_text
from mpcore.report.svg import (
    COLOURS,
    DASHES,
    Plot,
    clipped,
    corners,
    new_axes,
    smooth_curve,
    to_svg,
)

_SMALLEST_NORMAL = -14  # the exponent of float16's
_POINTS = 500  # that are marked one by one
_DOUBLINGS = 16  # to both sides of the scale of now, in "what if"


def loss_figure(logs: Sequence[RunLog], names: Sequence[str], name: str = "loss") -> Plot:
    """Plots the loss of each run over its steps, smoothed; returns an `<svg>` element.

    Args:
        logs: The runs.
        names: Of all runs of the page: each has its colour in every figure.
        name: Of the figure.
    """
    figure, axes = new_axes("step", "loss")
    for index, log in enumerate(logs):
        known = log.losses
        curve = smooth_curve([step for step, _ in known], [loss for _, loss in known])
        colour, dashes = style_of(log.name, names)
        # early ones are wider: where curves fall together all of them can be seen
        width = 1.3 + 1.6 * (len(logs) - 1 - index) / max(len(logs) - 1, 1)
        label = clipped(log.name)
        mark = "o" if len(known) == 1 else None
        axes.plot(*curve, color=colour, ls=dashes, lw=width, marker=mark, label=label)
        _mark_resumed(axes, log)
    return to_svg(figure, "Loss of each run over its steps", name)


def scale_figure(logs: Sequence[RunLog], names: Sequence[str], name: str = "scale") -> Plot:
    """Plots loss scales, with a cross for each skipped step; arguments as for losses."""
    figure, axes = new_axes("step", "loss scale")
    axes.set_yscale("log", base=2)
    for log in logs:
        colour, dashes = style_of(log.name, names)
        steps, scales = corners(log.steps, log.scales)
        label = clipped(log.name)
        axes.step(steps, scales, where="mid", color=colour, ls=dashes, lw=1.4, label=label)
        marks = _some(log.skipped)
        axes.plot([s for s, _ in marks], [s for _, s in marks], "x", color=colour, ms=7, mew=1.6)
        _mark_resumed(axes, log)
    if any(log.skipped for log in logs):
        axes.plot([], [], "x", color="#555555", ms=7, mew=1.6, label="skipped step")
    return to_svg(figure, "Loss scale over the steps; crosses mark skipped steps", name)


def histogram_figure(first: Reading, last: Reading, name: str = "histogram") -> Plot:
    """Plots gradients by exponent as float16 held them, of two readings; returns `<svg>`.

    Args:
        first: Drawn as a line.
        last: Drawn as bars.
        name: Of the figure.
    """
    figure, axes = new_axes("binary exponent of a gradient, scaled", "share of the values (%)")
    places = np.arange(LOWEST, HIGHEST + 1)
    bars = _percent(last)
    top = 1.25 * max(bars.max(), _percent(first).max(), 1e-9)
    axes.axvspan(LOWEST - 3, LOWEST - 0.5, color="#D55E00", alpha=0.16, lw=0)
    axes.axvspan(LOWEST - 0.5, _SMALLEST_NORMAL - 0.5, color="#E69F00", alpha=0.16, lw=0)
    axes.axvspan(HIGHEST + 0.5, HIGHEST + 3, color="#D55E00", alpha=0.16, lw=0)
    axes.bar(places, bars, width=0.86, color="#0072B2", label=f"step {last.step}")
    if first is not last:
        axes.step(
            places,
            _percent(first),
            where="mid",
            color="#1c2430",
            lw=1.2,
            label=f"step {first.step}",
        )
    for place, text in (
        (LOWEST - 1.75, "becomes 0"),
        ((LOWEST + _SMALLEST_NORMAL - 1) / 2, "loses digits"),
        ((_SMALLEST_NORMAL + HIGHEST) / 2, "FP16 keeps all its digits"),
        (HIGHEST + 1.75, "infinite"),
    ):
        narrow = text in ("becomes 0", "infinite")
        axes.text(
            place,
            0.97 * top,
            text,
            ha="center",
            va="top",
            fontsize=8,
            color="#5b6675",
            rotation=90 if narrow else 0,
        )
    axes.set_xlim(LOWEST - 3, HIGHEST + 3)
    axes.set_ylim(0, top)
    axes.set_xticks(range(LOWEST, HIGHEST + 2, 4))
    return to_svg(figure, "Gradients by binary exponent, with the range of FP16", name)


def what_if_figure(reading: Reading, name: str = "what-if") -> Plot:
    """Plots what would be lost and infinite at other scales; returns an `<svg>` element."""
    figure, axes = new_axes("if the loss scale were", "share of the values (%)", height=2.8)
    doublings = range(-_DOUBLINGS, _DOUBLINGS + 1)
    shares = [reading.at_scale(k) for k in doublings]
    now = reading.loss_scale
    scales = [now * 2.0**k for k in doublings]
    axes.set_xscale("log", base=2)
    axes.plot(scales, [100 * lost for lost, _ in shares], color="#0072B2", label="become 0")
    axes.plot(
        scales,
        [100 * over for _, over in shares],
        color="#D55E00",
        ls="--",
        label="become infinite: the step is skipped",
    )
    axes.axvline(now, color="#1c2430", lw=1, ls=":")
    first = next((k for k, (_, over) in zip(doublings, shares, strict=True) if over > 0), None)
    if first is not None:
        _mark_overflow(axes, now * 2.0**first)
    axes.annotate(
        "scale of the step",
        (now, 0.98),
        xycoords=axes.get_xaxis_transform(),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        va="top",
        color="#5b6675",
    )
    axes.set_ylim(bottom=0)
    return to_svg(figure, "Shares that would be lost or infinite at other loss scales", name)


def _mark_overflow(axes: Axes, scale: float) -> None:
    """Marks the lowest scale at which a value becomes infinite: steps are skipped from there on."""
    axes.plot([scale], [0], "^", color="#D55E00", ms=7, clip_on=False, zorder=3)
    axes.annotate(
        f"first overflow\nat {scale_text(scale)}",
        (scale, 0),
        xytext=(0, 9),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color="#a34700",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def lost_updates_figure(logs: Sequence[RunLog], names: Sequence[str], name: str = "lost") -> Plot:
    """Plots the updates that weights without masters would have lost; arguments as for losses."""
    figure, axes = new_axes("step", "updates lost (%)", height=2.8)
    for log in logs:
        known = _some(
            [(r.step, 100 * r.lost_updates) for r in log.readings if r.lost_updates is not None]
        )
        colour, dashes = style_of(log.name, names)
        axes.plot(
            [step for step, _ in known],
            [lost for _, lost in known],
            color=colour,
            ls=dashes,
            marker="o",
            ms=3,
            lw=1.2,
            label=clipped(log.name),
        )
    axes.set_ylim(0, 102)
    return to_svg(figure, "Share of updates that 16-bit weights without masters would lose", name)


def _percent(reading: Reading) -> NDArray[np.float64]:
    counts = np.asarray(reading.histogram, dtype=np.float64)
    return np.asarray(100 * counts / max(counts.sum(), 1))


def _some(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Returns at most as many points as a plot has room for, evenly spread, both ends included."""
    if len(points) <= _POINTS:
        return list(points)
    places = np.linspace(0, len(points) - 1, _POINTS).round().astype(int)
    return [points[place] for place in places]


def _mark_resumed(axes: Axes, log: RunLog) -> None:
    for step in log.resumed:
        axes.axvline(step - 0.5, color="#b8c0ca", lw=1, ls=":")


def style_of(name: str, names: Sequence[str]) -> tuple[str, str]:
    """Returns the colour and the dashes of a run, the same in every figure of a page.

    Example:
        >>> style_of("b", ["a", "b"])
        ('#0072B2', '-')
    """
    index = list(names).index(name)
    # after all colours the dashes shift, so that many runs differ in one of the two
    dashes = DASHES[(index + index // len(COLOURS)) % len(DASHES)]
    return COLOURS[index % len(COLOURS)], dashes
