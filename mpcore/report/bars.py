"""Bars of time and memory, one for each way of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from mpcore.monitoring.memory import Resident
from mpcore.report.svg import COLOURS, clipped, new_axes, to_svg

_PARTS = ("weights", "gradients", "masters", "moments", "activations")
_FILLS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7")


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


def memory_figure(stacks: Sequence[Stack], name: str) -> str:
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
    _finish(axes, [stack.name for stack in stacks], totals, "{:.1f}")
    described = ", ".join(f"{s.name} {total:.1f}" for s, total in zip(stacks, totals, strict=True))
    return to_svg(figure, f"Bytes per parameter: {described}", name)


def time_figure(seconds: Sequence[tuple[str, float]], name: str) -> str:
    """Plots the time of a step, one bar for each way of training; returns an `<svg>` element.

    Args:
        seconds: Names and times, from top to bottom.
        name: Of the figure, among those of its page.
    """
    names, times = [n for n, _ in seconds], [1e3 * taken for _, taken in seconds]
    figure, axes = new_axes("milliseconds per step", "", height=0.6 + 0.3 * len(seconds))
    axes.barh(range(len(times)), times, height=0.62, color=COLOURS[1])
    _finish(axes, names, times, "{:.3g}")
    described = ", ".join(f"{n} {taken:.3g}" for n, taken in zip(names, times, strict=True))
    return to_svg(figure, f"Milliseconds per step: {described}", name)


def _finish(axes: Axes, names: Sequence[str], ends: Sequence[float], form: str) -> None:
    """Writes names at the left of bars and values at their ends, the first bar on top."""
    axes.set_yticks(range(len(names)), map(clipped, names), fontsize=8.5)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.14 * max(*ends, 1e-9))
    for row, end in enumerate(ends):
        axes.annotate(
            form.format(end),
            (end, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
