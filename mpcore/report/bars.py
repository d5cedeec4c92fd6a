"""Bars of time and memory, one for each way of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from mpcore.monitoring.memory import Resident
from mpcore.report.svg import COLOURS, Plot, Row, clipped, new_axes, to_svg

_PARTS = ("weights", "gradients", "masters", "moments", "activations")
_FILLS = ("#0072B2", "#00939F", "#009E73", "#B97F00", "#C2629B")


@dataclass(frozen=True)
class Stack:
    """Bytes per parameter of one way of training.

    Attributes:
        name: What it is called.
        parts: What holds how many, in the order of drawing.
    """

    name: str
    parts: tuple[tuple[str, float], ...]

    @staticmethod
    def of(name: str, resident: Resident, activations: int | None = None) -> Stack:
        """Returns the stack of measured bytes.

        Args:
            name: What it is called.
            resident: What stays in memory.
            activations: Bytes saved for the backward pass, if they were counted.

        Example:
            >>> Stack.of("FP32", Resident(10, 40, 40, 0, 80)).parts[0]
            ('weights', 4.0)
        """
        sizes = (
            *(resident.weights, resident.gradients + resident.sums),
            *(resident.masters, resident.moments),
            activations or 0,
        )
        count = max(resident.parameters, 1)
        pairs = zip(_PARTS, sizes, strict=True)
        return Stack(name, tuple((part, size / count) for part, size in pairs))


def memory_figure(stacks: Sequence[Stack], name: str) -> Plot:
    """Plots bytes per parameter, one bar for each stack; returns an `<svg>` element.

    Args:
        stacks: From top to bottom.
        name: Of the figure, among those of its page.
    """
    figure, axes = new_axes("bytes per parameter", "", height=0.6 + 0.3 * len(stacks))
    for part, fill in zip(_PARTS, _FILLS, strict=True):
        starts = [sum(size for p, size in s.parts[: _PARTS.index(part)]) for s in stacks]
        sizes = [dict(stack.parts)[part] for stack in stacks]
        if any(sizes):
            axes.barh(range(len(stacks)), sizes, left=starts, height=0.62, color=fill, label=part)
    totals = [sum(size for _, size in stack.parts) for stack in stacks]
    _finish(axes, [stack.name for stack in stacks], totals, [f"{total:.1f}" for total in totals])
    described = ", ".join(f"{s.name} {total:.1f}" for s, total in zip(stacks, totals, strict=True))
    rows: tuple[Row, ...] = tuple((s.name, *dict(s.parts).values()) for s in stacks)
    data = (("way of training", *_PARTS), rows)
    return to_svg(figure, f"Bytes per parameter: {described}", name, data=data)


def time_figure(seconds: Sequence[tuple[str, Sequence[float]]], name: str) -> Plot:
    """Plots the time of a step, one bar for each way of training; returns an `<svg>` element.

    Args:
        seconds: Names and the times of steps, from top to bottom. Of several times it shows the
            median, with the quartiles beside it.
        name: Of the figure, among those of its page.
    """
    names = [n for n, _ in seconds]
    times = [[1e3 * q for q in quartiles(taken)] for _, taken in seconds]
    medians = [middle for _, middle, _ in times]
    spread = [[m - low for low, m, _ in times], [high - m for _, m, high in times]]
    figure, axes = new_axes("milliseconds per step", "", height=0.6 + 0.3 * len(seconds))
    axes.barh(range(len(times)), medians, height=0.62, color=COLOURS[1])
    axes.errorbar(medians, range(len(times)), xerr=spread, fmt="none", ecolor="#1c2430", lw=1)
    told = [
        f"{middle:.3g}" if low == high else f"{middle:.3g} ({low:.3g} to {high:.3g})"
        for low, middle, high in times
    ]
    _finish(axes, names, [high for _, _, high in times], told)
    described = ", ".join(f"{n} {text}" for n, text in zip(names, told, strict=True))
    header = ("way of training", "lower quartile (ms)", "median (ms)", "upper quartile (ms)")
    rows: tuple[Row, ...] = tuple((n, *three) for n, three in zip(names, times, strict=True))
    return to_svg(figure, f"Milliseconds per step: {described}", name, data=(header, rows))


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper one; of a single time three of it.

    Example:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0]), quartiles([2.0])
        ((2.0, 3.0, 4.0), (2.0, 2.0, 2.0))
    """
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
    return low, middle, high


def _finish(axes: Axes, names: Sequence[str], ends: Sequence[float], told: Sequence[str]) -> None:
    """Writes names at the left of bars and texts at their ends, the first bar on top."""
    axes.set_yticks(range(len(names)), map(clipped, names), fontsize=8.5)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    room = 1.1 + 0.02 * max(map(len, told))  # for the longest text
    axes.set_xlim(0, room * max(*ends, 1e-9))
    for row, (end, text) in enumerate(zip(ends, told, strict=True)):
        axes.annotate(
            text,
            (end, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
