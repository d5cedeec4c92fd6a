"""The plot: times of every row by parameter list, and the cost per parameter over the sizes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpcore.bench.experiment import BenchResult
from mpcore.bench.shapes import ParameterList

# Okabe and Ito's palette, which colour-blind readers can tell apart
_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#000000", "#009E73", "#CC79A7")
_MARKS = ("o", "s", "^", "v", "D", "P", "X")


def save_figure(result: BenchResult, path: Path) -> None:
    """Draws one panel per parameter list, and one over sizes if there are three lists or more.

    Args:
        result: What was measured.
        path: Where to write; the suffix decides the format: .svg, .png or .pdf.
    """
    lists = result.settings.lists
    panels = len(lists) + (len(lists) >= 3)
    figure = Figure(figsize=(7.0, 0.8 + 2.2 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    for listed, panel in zip(lists, axes, strict=False):
        _bars(result, listed, panel)
    if panels > len(lists):
        _sizes(result, axes[-1])
    figure.savefig(path)


def _bars(result: BenchResult, listed: ParameterList, axes: Axes) -> None:
    timed = [o for o in result.outcomes if o.listed == listed and o.times is not None]
    for place, outcome in enumerate(timed):
        if outcome.times is None:
            continue
        low, middle, high = (1e3 * seconds for seconds in outcome.times.quartiles)
        colour = _COLOURS[place % len(_COLOURS)]
        axes.barh(place, middle, color=colour, height=0.7)
        axes.errorbar(
            middle, place, xerr=[[middle - low], [high - middle]], color="#555555", capsize=3
        )
    axes.set_yticks(range(len(timed)), [outcome.row.label for outcome in timed], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms per step, median and quartiles", fontsize=8)
    axes.set_title(f"{listed.name} ({listed.count:,} parameters)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _sizes(result: BenchResult, axes: Axes) -> None:
    rows = list(dict.fromkeys(outcome.row.key for outcome in result.outcomes if outcome.times))
    for place, key in enumerate(rows):
        points = sorted(
            (o.listed.count, 1e9 * o.times.median / o.listed.count, o.row.label)
            for o in result.outcomes
            if o.row.key == key and o.times is not None
        )
        counts, costs, labels = zip(*points, strict=True)
        colour = _COLOURS[place % len(_COLOURS)]
        axes.plot(counts, costs, color=colour, marker=_MARKS[place % len(_MARKS)], label=labels[0])
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("parameters", fontsize=8)
    axes.set_ylabel("ns per parameter", fontsize=8)
    axes.set_title("Cost per parameter", fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
