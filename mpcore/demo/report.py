"""The demo's HTML report."""

from __future__ import annotations

from mpcore.demo.experiment import DemoResult
from mpcore.demo.figures import difference_figure, loss_figure, scale_figure
from mpcore.demo.regimes import FP16_MASTERS, GPT_REGIMES
from mpcore.demo.tables import bytes_table, digits_table, gpt_table
from mpcore.report.bars import Stack, memory_figure, time_figure
from mpcore.report.page import Picture, Section, render_page
from mpcore.report.run_page import gradient_sections, lost_updates_section, skips_section
from mpcore.report.svg import Plot


def render_report(result: DemoResult) -> str:
    """Renders the report as one HTML page that fetches nothing.

    Args:
        result: What was measured.

    Returns:
        The page. Equal results give equal pages, but for the times taken.
    """
    gpt, digits, sizes = gpt_table(result), digits_table(result), bytes_table(result)
    watched = [run.log for run in (result.of(r)[0] for r in GPT_REGIMES) if run.log is not None]
    overflows = [(log.name, report) for log in watched for report in log.overflows]
    skips = (skips_section(overflows, many=True),) if overflows else ()
    main = next(log for log in watched if log.name == FP16_MASTERS.label)
    sections = (
        Section(gpt.title, (gpt.without_title(),)),
        Section("Training loss", (Picture(loss_figure(result), _LOSS),)),
        Section("How far above FP32", (Picture(difference_figure(result), _DIFFERENCE),)),
        Section("The loss scale finds its level", (Picture(scale_figure(result), _SCALE),)),
        *skips,
        *gradient_sections(main),
        *lost_updates_section(watched),
        Section(digits.title, (digits.without_title(),)),
        Section(sizes.title, (Picture(_memory(result), _MEMORY), sizes.without_title())),
        Section("Time", (Picture(_time(result), _TIME),)),
    )
    seeds = ", ".join(map(str, result.settings.seeds))
    footer = f"Seeds: {seeds}. Took {result.seconds:.0f} s, CPU threads: {result.settings.threads}."
    corpus = result.corpus
    lead = _LEAD.format(
        characters=len(corpus.train),
        files=len(corpus.train_files),
        held_out=len(corpus.validation_files),
    )
    return render_page("16-bit training with FP32 masters and loss scaling", lead, sections, footer)


def _memory(result: DemoResult) -> Plot:
    runs = [result.of(regime)[0] for regime in GPT_REGIMES]
    return memory_figure([Stack.of(run.regime.label, run.resident) for run in runs], "memory")


def _time(result: DemoResult) -> Plot:
    steps = result.settings.gpt.steps
    runs = [result.of(regime)[0] for regime in GPT_REGIMES]
    return time_figure([(run.regime.label, [run.seconds / steps]) for run in runs], "time")


_LEAD = (
    "The same small GPT, trained in eight ways from the same initial weights on the same batches: "
    "{characters:,} characters of the Python standard library's own source ({files} files), with "
    "{held_out} files held out. Matrix products of 16-bit numbers are computed as a tensor core "
    "computes them: exact products, FP32 sums, one rounding."
)
_LOSS = (
    "Mean over the seeds, smoothed over a twentieth of the run. Curves of regimes that keep FP32 "
    "accuracy lie on top of each other."
)
_DIFFERENCE = (
    "The same curves minus that of FP32, batch by batch. FP16 without loss scaling leaves the "
    "frame upwards. A skipped step in the warm-up costs one step of learning, which shows early on."
)
_SCALE = (
    "First seed. A cross is a step that was skipped because a gradient overflowed; the scale is "
    "halved and the weights stay as they were."
)
_MEMORY = "Weights, gradients, masters and moments, from the sizes of the tensors."
_TIME = (
    "Whole run over its steps, validation and counting included. It says nothing about the speed "
    "of 16-bit training: on a CPU tensor cores are emulated, which takes longer."
)
