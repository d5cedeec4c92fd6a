"""The page of one or several runs: `mpcore report run.jsonl`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mpcore.base import Table
from mpcore.monitoring.reading import Reading
from mpcore.monitoring.report import OverflowReport
from mpcore.monitoring.run_log import RunLog
from mpcore.monitoring.verdicts import scale_text
from mpcore.report.bars import Stack, memory_figure, time_figure
from mpcore.report.heat import activations_map, digits_map, room_map
from mpcore.report.page import Event, Events, Picture, Section, Text, render_page
from mpcore.report.run_figures import (
    histogram_figure,
    loss_figure,
    lost_updates_figure,
    scale_figure,
    what_if_figure,
)

_SHOWN = 30  # skipped steps in a list


def render_runs(logs: Sequence[RunLog], title: str) -> str:
    """Returns the page of runs as HTML that fetches nothing.

    Args:
        logs: What their monitors told.
        title: Of the page.
    """
    steps = sum(len(log.steps) for log in logs)
    readings = sum(len(log.readings) for log in logs)
    lead = f"{', '.join(log.name for log in logs)}: {steps:,} steps, {readings:,} readings."
    parts = [(log.name, told) for log in logs if (told := log.told())]
    lead += "".join(f" {name}: {told}" if len(logs) > 1 else f" {told}" for name, told in parts)
    timed = [(log.name, log.seconds) for log in logs if log.seconds]
    memory = [(log.name, log.readings[-1].memory) for log in logs if log.readings]
    stacks = [Stack.of(name, resident) for name, resident in memory if resident is not None]
    sections = (
        Section("In numbers", (summary_table(logs),)),
        *course_sections(logs),
        *(
            section
            for index, log in enumerate(logs)
            for section in (
                *gradient_sections(log, index, named=len(logs) > 1),
                *activation_sections(log, named=len(logs) > 1),
            )
        ),
        *lost_updates_section(logs),
        *cost_sections(timed, stacks, (_TIME, _MEMORY)),
    )
    return render_page(title, lead, sections, "")


def summary_table(logs: Sequence[RunLog]) -> Table:
    """Returns a row for each run."""
    return Table(
        title="",
        header=("Run", "Steps", "Skipped", "Last loss", "Last scale", "Headroom", "Not normal"),
        rows=tuple(map(_summary, logs)),
        notes=(
            "Not normal: reports on skipped steps whose verdict asks for something to be done. "
            "The search for a scale at the start and its later growth skip steps as they should.",
            "Headroom: doublings of the loss scale before the largest gradient overflows, at the "
            "last reading.",
        ),
    )


def _summary(log: RunLog) -> tuple[str, ...]:
    losses, scales = log.losses, log.scales
    asking = [report for report in log.overflows if not report.verdict.normal]
    return (
        log.name,
        f"{len(log.steps):,}",
        f"{len(log.skipped):,}",
        f"{losses[-1][1]:.4g}" if losses else "",
        scale_text(scales[-1]) if scales else "",
        _headroom(log),
        ", ".join(f"{n} {name}" for name, n in Counter(r.verdict.name for r in asking).items())
        or "none",
    )


def _headroom(log: RunLog) -> str:
    room = log.readings[-1].headroom_bits if log.readings else None
    return "" if room is None else f"{room:.1f}"


def course_sections(logs: Sequence[RunLog]) -> tuple[Section, ...]:
    """Returns losses, scales and skipped steps, as far as they are known."""
    sections, names = [], [log.name for log in logs]
    known = [log for log in logs if log.losses]
    if known:
        sections.append(Section("Loss", (Picture(loss_figure(known, names), _LOSS),)))
    scaled = [log for log in logs if set(log.scales) - {1.0}]
    if scaled:
        sections.append(Section("Loss scale", (Picture(scale_figure(scaled, names), _SCALE),)))
    overflows = [(log.name, report) for log in logs for report in log.overflows]
    if overflows:
        sections.append(skips_section(overflows, many=len(logs) > 1))
    return tuple(sections)


def skips_section(overflows: Sequence[tuple[str, OverflowReport]], *, many: bool) -> Section:
    """Returns the reports on skipped steps: those that ask for something first, then the newest.

    Args:
        overflows: Names of runs, and reports.
        many: Whether there are several runs, so that names matter.
    """
    ranked = sorted(overflows, key=lambda one: (one[1].verdict.normal, -one[1].step))
    events = tuple(
        Event(
            when=f"{name}, step {report.step:,}" if many else f"Step {report.step:,}",
            facts=f"{report.verdict.name}, loss scale {report.scales()}, {_where(report)}",
            text=str(report.verdict),
            normal=report.verdict.normal,
        )
        for name, report in ranked[:_SHOWN]
    )
    more = len(ranked) - _SHOWN
    rest = (Text(f"{more} more are in the records and not shown."),) if more > 0 else ()
    return Section("Skipped steps", (Events(events), *rest))


def _where(report: OverflowReport) -> str:
    bad = report.overflowed
    if not bad:
        return "gradients unknown"
    others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"{bad[0].name} {'/'.join(bad[0].kinds)}{others}"


def gradient_sections(log: RunLog, index: int = 0, *, named: bool = False) -> tuple[Section, ...]:
    """Returns exponents, other scales and heat maps of a run, if it has float16 gradients.

    Args:
        log: The run.
        index: Its number on the page, which keeps the names of figures apart.
        named: Whether titles say which run it is.
    """
    counted = [reading for reading in log.readings if sum(reading.histogram)]
    if not counted:
        return ()
    of_run = f": {log.name}" if named else ""
    first, last = counted[0], counted[-1]
    return (
        Section(
            f"Gradients by exponent{of_run}",
            (
                Picture(histogram_figure(first, last, f"histogram{index}"), _HISTOGRAM),
                Picture(what_if_figure(last, f"what-if{index}"), _what_if(last)),
            ),
        ),
        Section(f"Layer by layer{of_run}", (room_map(log.readings), digits_map(log.readings))),
    )


def activation_sections(log: RunLog, *, named: bool = False) -> tuple[Section, ...]:
    """Returns what modules returned, of a run whose activations were watched.

    Args:
        log: The run.
        named: Whether the title says which run it is.
    """
    if not any(reading.activations for reading in log.readings):
        return ()
    of_run = f": {log.name}" if named else ""
    return (Section(f"Module by module{of_run}", (activations_map(log.readings),)),)


def _what_if(reading: Reading) -> str:
    flushed = ""
    if reading.flushed:
        flushed = f" About {reading.flushed:.1%} became 0 at this scale already."
    zeros = "" if reading.zeros is None else f" ({reading.zeros:.1%} of all values)"
    return (
        f"The gradients of step {reading.step} at other scales: a power of two moves every "
        f"exponent by as much. Zeros are in no share{zeros}.{flushed}"
    )


def lost_updates_section(logs: Sequence[RunLog]) -> tuple[Section, ...]:
    """Returns what masters saved, of runs that have some."""
    known = [log for log in logs if any(r.lost_updates is not None for r in log.readings)]
    if not known:
        return ()
    picture = Picture(lost_updates_figure(known, [log.name for log in logs]), _LOST)
    return (Section("Updates that need masters", (picture,)),)


def cost_sections(
    timed: Sequence[tuple[str, Sequence[float]]], stacks: Sequence[Stack], captions: tuple[str, str]
) -> tuple[Section, ...]:
    """Returns time and memory, as far as they are known.

    Args:
        timed: Names, and the seconds of steps.
        stacks: Bytes per parameter.
        captions: Of the times, and of the bytes.
    """
    pictures = []
    if timed:
        pictures.append(Picture(time_figure(timed, "time"), captions[0]))
    if stacks:
        pictures.append(Picture(memory_figure(stacks, "memory"), captions[1]))
    return (Section("Time and memory", tuple(pictures)),) if pictures else ()


_LOSS = "Before scaling, each step's own batch, smoothed over a twentieth of the run."
_SCALE = "A cross is a step that was skipped because a gradient was not finite."
_HISTOGRAM = (
    "How large the gradients are in FP16, scaled as they were. Bars: the last reading; line: the "
    "first. What lies at the left of 2^-14 is subnormal and keeps fewer digits; below 2^-24 it is "
    "0; above 2^15 it is infinite."
)
_LOST = (
    "Share of the updates that change an FP32 master and would have been rounded away in a 16-bit "
    "weight. A sample of at most 4,096 of each parameter."
)
_TIME = (
    "From the end of one optimizer step to the end of the next, as the host sees it, data, forward "
    "and backward pass included: median and quartiles."
)
_MEMORY = "What stays in memory between backward and zero_grad. Activations are not counted."
