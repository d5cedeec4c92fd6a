"""The report's plots, as SVG text to be put into an HTML page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mpcore.demo.experiment import DemoResult
from mpcore.demo.regimes import (
    AUTOCAST,
    BF16_MASTERS,
    BF16_ROUNDED,
    FP16_HEADROOM,
    FP16_MASTERS,
    FP16_ROUNDED,
    FP16_UNSCALED,
    FP32,
    GPT_REGIMES,
    Regime,
)
from mpcore.report.svg import Plot, new_axes, smooth, to_svg

# Near Okabe and Ito's palette (see mpcore.report.svg): colour, dashes, width. Curves
# that fall together are told apart by their widths: wide ones are drawn first.
_STYLES: dict[Regime, tuple[str, str, float]] = {
    FP16_ROUNDED: ("#B97F00", "-", 3.4),
    BF16_ROUNDED: ("#00939F", "-", 1.4),
    FP16_UNSCALED: ("#D55E00", "-", 1.4),
    FP32: ("#000000", "-", 2.0),
    FP16_MASTERS: ("#0072B2", "-", 1.2),
    FP16_HEADROOM: ("#8F8000", "-.", 1.2),
    BF16_MASTERS: ("#009E73", "--", 1.2),
    AUTOCAST: ("#C2629B", ":", 1.4),
}
_SKIPPED = "skipped step"


def loss_figure(result: DemoResult) -> Plot:
    """Plots the training loss of every regime, averaged over seeds, smoothed.

    Returns:
        An `<svg>` element.
    """
    figure, axes = new_axes("step", "loss (nats per character)")
    for regime in _STYLES:
        _line(axes, regime, smooth(_losses(result, regime)))
    return _svg(figure, "Training loss of every regime over the steps", "loss")


def difference_figure(result: DemoResult) -> Plot:
    """Plots how far each regime's training loss is above FP32's on the same batches.

    Returns:
        An `<svg>` element. The regime without loss scaling leaves its frame.
    """
    figure, axes = new_axes("step", "loss above FP32")
    baseline = _losses(result, FP32)
    settled = result.settings.gpt.warmup  # skips during the warm-up throw the early curves about
    highest = 1e-3
    for regime in _STYLES:
        curve = smooth(_losses(result, regime) - baseline)
        _line(axes, regime, curve)
        if regime != FP16_UNSCALED:
            highest = max(highest, float(np.abs(curve[settled:]).max(initial=0.0)))
    axes.set_ylim(-0.6 * highest, 1.2 * highest)
    return _svg(figure, "Training loss of every regime minus that of FP32", "difference")


def scale_figure(result: DemoResult) -> Plot:
    """Plots the loss scale of the first seed's scaled runs, with skipped steps marked.

    Returns:
        An `<svg>` element.
    """
    figure, axes = new_axes("step", "loss scale")
    axes.set_yscale("log", base=2)
    for regime in (r for r in _STYLES if r.scaled):
        run = result.of(regime)[0]
        colour, dashes, width = _STYLES[regime]
        steps = range(1, len(run.scales) + 1)
        axes.step(
            steps, run.scales, where="mid", color=colour, ls=dashes, lw=width, label=regime.label
        )
        marks = [run.scales[step] for step in run.skipped]
        axes.plot([step + 1 for step in run.skipped], marks, "x", color=colour, ms=7, mew=1.6)
    axes.plot([], [], "x", color="#555555", ms=7, mew=1.6, label=_SKIPPED)
    return _svg(figure, "Loss scale over the steps; crosses mark skipped steps", "scale")


def _losses(result: DemoResult, regime: Regime) -> NDArray[np.float64]:
    curves: Sequence[Sequence[float]] = [run.train_losses for run in result.of(regime)]
    averages: NDArray[np.float64] = np.mean(np.array(curves, dtype=np.float64), axis=0)
    return averages


def _line(axes: Axes, regime: Regime, values: NDArray[np.float64]) -> None:
    colour, dashes, width = _STYLES[regime]
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, values, color=colour, ls=dashes, lw=width, label=regime.label)


def _svg(figure: Figure, description: str, name: str) -> Plot:
    # in the order of the tables, not in that of drawing
    return to_svg(figure, description, name, [*(r.label for r in GPT_REGIMES), _SKIPPED])
