"""The page of a comparison: `mpcore compare`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mpcore.base import Table, capitalized
from mpcore.monitoring.memory import Resident
from mpcore.monitoring.run_log import RunLog
from mpcore.report.bars import Stack
from mpcore.report.page import Event, Events, Picture, Section, render_page
from mpcore.report.run_figures import style_of
from mpcore.report.run_page import (
    cost_sections,
    course_sections,
    gradient_sections,
    lost_updates_section,
)
from mpcore.report.svg import COLOURS, Plot, clipped, new_axes, smooth_curve, to_svg


class Agreement(Protocol):
    """What may be said of a policy beside FP32."""

    @property
    def name(self) -> str:
        """The verdict in a word."""

    @property
    def text(self) -> str:
        """And in a sentence."""


class Run(Protocol):
    """What one run did: see `mpcore.comparison.result.Outcome`."""

    @property
    def metric(self) -> float:
        """What the loop returned."""

    @property
    def log(self) -> RunLog:
        """Losses, scales, skipped steps, readings."""

    @property
    def seconds(self) -> float | None:
        """Median of a step."""

    @property
    def memory(self) -> Resident | None:
        """Bytes that stay."""

    @property
    def activations(self) -> int | None:
        """Bytes that the first forward pass saved."""


class Compared(Protocol):
    """What a page needs of a `mpcore.Comparison`."""

    @property
    def metric(self) -> str:
        """What the number is called that was compared."""

    @property
    def margin(self) -> float:
        """Share of FP32's mean that does not matter."""

    @property
    def labels(self) -> list[str]:
        """The policies with their loss scales, FP32 first."""

    @property
    def agreements(self) -> Mapping[str, Agreement]:
        """What may be said of each policy."""

    def of(self, label: str) -> Sequence[Run]:
        """Returns the runs of a policy, by seed."""

    def table(self) -> Table:
        """Returns the verdicts as a table."""


def render_comparison(comparison: Compared) -> str:
    """Returns the page of a comparison as HTML that fetches nothing; needs SciPy.

    Args:
        comparison: What was found.
    """
    logs = [comparison.of(label)[0].log for label in comparison.labels]
    table = comparison.table()
    sections = (
        Section("Verdict", (_verdicts(comparison), table.without_title())),
        Section(
            f"{capitalized(comparison.metric)}, seed by seed",
            (Picture(_metric_figure(comparison), _METRIC),),
        ),
        *course_sections(logs),
        *_difference_section(comparison),
        *(
            section
            for index, log in enumerate(logs)
            for section in gradient_sections(log, index, named=True)
        ),
        *lost_updates_section(logs),
        *_cost(comparison),
    )
    lead = (
        f"{table.title}. The same loop, initial weights and batches; only the policy differs. "
        "Curves and gradients are those of the first seed."
    )
    return render_page("Does it match FP32?", lead, sections, "")


def _verdicts(comparison: Compared) -> Events:
    return Events(
        tuple(
            Event(label, found.name, found.text, normal=found.name == "matches")
            for label, found in comparison.agreements.items()
        )
    )


def _metric_figure(comparison: Compared) -> Plot:
    labels = comparison.labels
    figure, axes = new_axes(clipped(comparison.metric), "", height=1.0 + 0.4 * len(labels))
    for row, label in enumerate(labels):
        metrics = [outcome.metric for outcome in comparison.of(label)]
        colour, _ = style_of(label, labels)
        axes.plot(metrics, [row] * len(metrics), "o", color=colour, ms=5, alpha=0.6)
        if all(map(math.isfinite, metrics)):
            axes.plot([statistics.fmean(metrics)], [row], "|", color=colour, ms=18, mew=2)
    bases = [outcome.metric for outcome in comparison.of(labels[0])]
    if all(map(math.isfinite, bases)):
        base = statistics.fmean(bases)
        width = comparison.margin * abs(base)
        axes.axvspan(base - width, base + width, color="#009E73", alpha=0.12, lw=0)
    axes.set_yticks(range(len(labels)), map(clipped, labels), fontsize=8.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    columns = [[run.metric for run in comparison.of(label)] for label in labels]
    rows = tuple((place, *row) for place, row in enumerate(zip(*columns, strict=True)))
    data = (("run", *labels), rows)
    return to_svg(figure, f"{comparison.metric} of every policy and seed", "metric", data=data)


def _difference_section(comparison: Compared) -> tuple[Section, ...]:
    labels = comparison.labels
    figure, axes = new_axes("step", "loss above FP32's")
    for label in labels[1:]:
        curves = [
            _difference(run.log.losses, base.log.losses)
            for run, base in zip(comparison.of(label), comparison.of(labels[0]), strict=True)
        ]
        length = min(map(len, curves))
        if not length:
            return ()
        colour, dashes = style_of(label, labels)
        with np.errstate(invalid="ignore"):  # of infinite losses
            mean = np.mean([curve[:length] for curve in curves], axis=0)
        curve = smooth_curve(range(length), mean)
        axes.plot(*curve, color=colour, ls=dashes, lw=1.4, label=clipped(label))
    axes.axhline(0, color=COLOURS[0], lw=0.8)
    svg = to_svg(figure, "Loss of every policy minus that of FP32 on the same batches", "above")
    return (Section("How far above FP32", (Picture(svg, _DIFFERENCE),)),)


def _difference(
    losses: Sequence[tuple[int, float]], others: Sequence[tuple[int, float]]
) -> NDArray[np.float64]:
    """Returns loss minus loss of the steps that both have."""
    known = dict(others)
    return np.array([loss - known[step] for step, loss in losses if step in known])


def _cost(comparison: Compared) -> tuple[Section, ...]:
    timed: list[tuple[str, Sequence[float]]] = []
    stacks: list[Stack] = []
    for label in comparison.labels:
        runs = comparison.of(label)
        seconds = [taken for run in runs for taken in run.log.seconds]
        if seconds:
            timed.append((label, seconds))
        if runs[0].memory is not None:
            stacks.append(Stack.of(label, runs[0].memory, runs[0].activations))
    return cost_sections(timed, stacks, (_TIME, _MEMORY))


_METRIC = (
    "Dots: one seed each; bars: their mean. Green: what is within the margin of FP32's mean. The "
    "verdict compares seed with seed, which tells more than the spread of the dots."
)
_DIFFERENCE = (
    "The same batches, mean over the seeds, smoothed over a twentieth of the run. What rounding "
    "changes goes up and down around 0; a policy that loses something stays above it."
)
_TIME = (
    "From the end of one step to the end of the next, data, forward and backward pass included: "
    "median and quartiles of all steps and seeds. On a CPU products of 16-bit numbers are slow."
)
_MEMORY = (
    "Weights, gradients, masters and moments stay; activations are what the first forward pass "
    "saved for its backward pass."
)
