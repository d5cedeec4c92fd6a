"""Do two ways of training agree? Paired differences, and what they allow to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

CONFIDENCE = 0.9  # of an interval: 95 % to each side


@dataclass(frozen=True)
class Agreement:
    """What the metrics of the same seeds say about one policy.

    Attributes:
        name: "matches": no worse than FP32 by more than the margin, with 95 % confidence; "worse":
            worse by more than that; "undecided": the seeds do not tell; "one seed"; "fails": a
            metric is not finite.
        difference: Mean of metric minus that of FP32.
        interval: 90 % confidence interval of the difference; None if there is none.
        p: Of the two-sided paired t-test, the chance of such a difference between equals.
        margin: What counts as the same, in units of the metric.
        text: All that in a sentence.
    """

    name: str
    difference: float
    interval: tuple[float, float] | None
    p: float | None
    margin: float
    text: str


def check_scipy() -> None:
    """Raises if the test of several seeds cannot be made: better before hours of training."""
    if find_spec("scipy") is None:
        raise ModuleNotFoundError(
            'compare: the test of several seeds needs scipy. Run: pip install "mpcore[report]", or '
            "pass seeds=1.",
            name="scipy",
        )


def agreement(
    metrics: Sequence[float],
    baseline: Sequence[float],
    *,
    higher_is_better: bool,
    margin: float,
) -> Agreement:
    """Returns what paired metrics allow to say; needs SciPy for more than one seed.

    Two one-sided t-tests against a margin (Schuirmann, Journal of Pharmacokinetics and
    Biopharmaceutics 15, 1987): a large p-value alone would only say that there were few seeds.

    Args:
        metrics: Of the policy, one for each seed.
        baseline: Of FP32, with the same seeds.
        higher_is_better: Whether a large metric is a good one.
        margin: Share of the mean of the baseline that does not matter.

    Example:
        >>> found = agreement([1.0], [1.0], higher_is_better=False, margin=0.01)
        >>> found.name, found.difference
        ('one seed', 0.0)
    """
    mean = sum(baseline) / len(baseline)
    width = margin * abs(mean)
    bad = sum(not math.isfinite(metric) for metric in metrics)
    if bad or not math.isfinite(mean):
        reason = f"{bad} of {len(metrics)} metrics" if bad else "the metric of FP32"
        text = f"Not finite: {reason}."
        return Agreement("fails", math.nan, None, None, width, text)
    differences = [metric - base for metric, base in zip(metrics, baseline, strict=True)]
    difference = sum(differences) / len(differences)
    shown = _share(difference, mean)
    if len(differences) == 1:
        text = f"{shown} of FP32 with one seed; run more to know what another seed would give."
        return Agreement("one seed", difference, None, None, width, text)
    low, high, p = _paired(differences)
    best, worst = (-high, -low) if higher_is_better else (low, high)
    name = "matches" if worst <= width else "worse" if best > width else "undecided"
    if p is None:  # equal differences have no spread, which says little of other seeds
        name = "undecided"
    text = {
        "matches": f"No worse than FP32 by more than {margin:.1%}",
        "worse": f"Worse than FP32 by more than {margin:.1%}",
        "undecided": "These seeds do not tell; run more, or widen the margin",
    }[name]
    text += f": {shown}, between {_share(low, mean)} and {_share(high, mean)}."
    return Agreement(name, difference, (low, high), p, width, text)


def _paired(differences: Sequence[float]) -> tuple[float, float, float | None]:
    """Returns the ends of the confidence interval of the mean, and the p-value of its being 0."""
    same = differences[0]
    if len(set(differences)) == 1:  # no spread: nothing that a test could measure with
        return same, same, 1.0 if same == 0 else None
    from scipy import stats  # type: ignore[import-untyped]

    result = stats.ttest_1samp(differences, 0.0)
    interval = result.confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high), float(result.pvalue)


def _share(difference: float, mean: float) -> str:
    return f"{difference / abs(mean):+.2%}" if mean else f"{difference:+.3g}"
