"""What a comparison found."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mpcore.base import Table, capitalized
from mpcore.comparison.contender import BASELINE
from mpcore.comparison.outcome import Outcome as Outcome
from mpcore.comparison.statistics import Agreement, agreement

_APART = 0.05  # first losses that differ by more than this share of FP32's largest one


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `print(comparison)`, or `comparison.write_html("compare.html")`.

    Attributes:
        metric: What the number is called that was compared.
        higher_is_better: Whether a large one is good.
        margin: Share of FP32's mean that does not matter.
        outcomes: One for each policy and seed, in the order of the runs.

    Example:
        >>> from mpcore.monitoring.run_log import RunLog
        >>> log = RunLog("float32", (), (), ())
        >>> run = Outcome("float32", 0, 0.5, log, None, None, None, None)
        >>> found = Comparison("loss", False, 0.01, (run, replace(run, label="float16")))
        >>> print(found.agreements["float16"].text)
        +0.00% of FP32 with one seed; run more to know what another seed would give.
    """

    metric: str
    higher_is_better: bool
    margin: float
    outcomes: tuple[Outcome, ...]

    @property
    def labels(self) -> list[str]:
        """The policies with their loss scales, FP32 first."""
        return list(dict.fromkeys(outcome.label for outcome in self.outcomes))

    def of(self, label: str) -> list[Outcome]:
        """Returns the runs of a policy, by seed."""
        return [outcome for outcome in self.outcomes if outcome.label == label]

    @cached_property
    def agreements(self) -> dict[str, Agreement]:
        """What may be said of each policy; needs SciPy if there are several seeds."""
        baseline = [outcome.metric for outcome in self.of(BASELINE.label)]
        found = {}
        for label in self.labels[1:]:
            runs = self.of(label)
            found[label] = agreement(
                [run.metric for run in runs],
                baseline,
                higher_is_better=self.higher_is_better,
                margin=self.margin,
            )
            stuck = [run for run in runs if 2 * len(run.log.skipped) > len(run.log.steps) > 0]
            if stuck:
                text = f"Most steps were skipped in {len(stuck)} of {len(runs)} runs."
                found[label] = replace(found[label], name="fails", text=text)
        return found

    @property
    def warnings(self) -> list[str]:
        """What makes the comparison doubtful: runs that did not begin alike or stopped early."""
        found = []
        for label in self.labels[1:]:
            for run, base in zip(self.of(label), self.of(BASELINE.label), strict=True):
                if run.failure is not None:
                    found.append(f"{label}, seed {run.seed}: {run.failure}")
                elif len(run.log.steps) != len(base.log.steps):
                    found.append(
                        f"{label}, seed {run.seed}: {len(run.log.steps):,} steps, and "
                        f"{len(base.log.steps):,} in FP32."
                    )
                elif _begin_apart(run, base):
                    found.append(
                        f"{label}, seed {run.seed}: the first loss is {run.first_loss:.4g}, and "
                        f"{base.first_loss:.4g} in FP32. Do weights and batches follow from "
                        "run.seed alone?"
                    )
        return found

    def table(self) -> Table:
        """Returns a row for each policy."""
        seeds = [outcome.seed for outcome in self.of(BASELINE.label)]
        better = "higher is better" if self.higher_is_better else "lower is better"
        return Table(
            title=f"{self.metric} ({better}), seeds: {', '.join(map(str, seeds))}",
            header=(
                *("Policy", capitalized(self.metric), "vs FP32", "p", "Verdict", "Skips"),
                *("ms per step", "Bytes per param", "Activations"),
            ),
            rows=tuple(self._row(label) for label in self.labels),
            notes=(
                f"Matches: with 95 % confidence no worse than FP32 by more than {self.margin:.1%} "
                "(paired t-test of the seeds against that margin). p: of a two-sided paired "
                "t-test, the chance of such a difference if there were none.",
                "Skips: skipped steps, all seeds. Bytes per param: weights, gradients, masters "
                "and moments. Activations: saved by the first forward pass, as a share of FP32's.",
                *self.warnings,
            ),
        )

    def _row(self, label: str) -> tuple[str, ...]:
        runs = self.of(label)
        found = self.agreements.get(label)
        metrics = [run.metric for run in runs]
        memory = next((run.memory for run in runs if run.memory is not None), None)
        times = [run.seconds for run in runs if run.seconds is not None]
        return (
            label,
            mean_and_spread(metrics),
            "" if found is None else self._versus(found),
            "" if found is None or found.p is None else f"{found.p:.2g}",
            "" if found is None else found.name,
            f"{sum(len(run.log.skipped) for run in runs):,}",
            f"{1e3 * statistics.median(times):.3g}" if times else "",
            "" if memory is None else f"{memory.per_parameter:.1f}",
            self._activations(runs),
        )

    def _versus(self, found: Agreement) -> str:
        if not math.isfinite(found.difference):
            return ""
        base = statistics.fmean(outcome.metric for outcome in self.of(BASELINE.label))
        return f"{found.difference / abs(base):+.2%}" if base else f"{found.difference:+.3g}"

    def _activations(self, runs: Sequence[Outcome]) -> str:
        own, base = runs[0].activations, self.of(BASELINE.label)[0].activations
        return f"{own / base:.0%}" if own is not None and base else ""

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report: one page that fetches nothing. Needs the extra `report`.

        Args:
            path: Of the file.
        """
        from mpcore.report.compare_page import render_comparison

        Path(path).write_text(render_comparison(self), encoding="utf-8")

    def __str__(self) -> str:
        table = self.table()
        widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (table.header, *table.rows)
        ]
        verdicts = [f"{label}: {found.text}" for label, found in self.agreements.items()]
        return "\n".join([table.title, *lines, *verdicts, *self.warnings])


def mean_and_spread(values: Sequence[float]) -> str:
    """Returns the mean with its standard deviation, to two digits of that.

    Example:
        >>> mean_and_spread([95.0, 97.0]), mean_and_spread([0.5]), mean_and_spread([1.0, 1.0])
        ('96.0 ± 1.4', '0.5', '1')
    """
    if not all(map(math.isfinite, values)):
        return "not finite"
    mean = statistics.fmean(values)
    known = len(values) > 1
    spread = statistics.stdev(values) if known else 0.0
    if not spread:
        return f"{mean:.4g}"
    if not 1e-3 <= abs(mean) < 1e6:
        return f"{mean:.3g} ± {spread:.2g}"
    places = max(0, 1 - math.floor(math.log10(spread)))
    return f"{mean:.{places}f} ± {spread:.{places}f}"


def _begin_apart(run: Outcome, base: Outcome) -> bool:
    """Whether first losses differ by more than rounding explains, against what losses are like."""
    if run.first_loss is None or base.first_loss is None:
        return False
    sizes = [abs(base.first_loss), *(abs(loss) for _, loss in base.log.losses)]
    size = max(filter(math.isfinite, sizes), default=0.0)
    return not abs(run.first_loss - base.first_loss) <= _APART * size
