"""Why a step was skipped, in words: rules over what is known, most certain first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from mpcore.headroom import HeadroomLossScale
from mpcore.loss_scale import DynamicLossScale, LossScale, StaticLossScale
from mpcore.monitoring.findings import Finding

#: clean steps at a scale, or a higher one, after which an overflow there is unusual
_PROVEN = 100
#: the least that proves something, and enough where the scale has never grown
_FEW = 20


@dataclass(frozen=True)
class Verdict:
    """What happened, and what to do.

    Attributes:
        name: One word for programs: "search", "probe", "spike", "nan", "forward", "floor",
            "saturated", "weights", "buffers", "static" or "other".
        normal: Whether nothing has to be done.
        text: What happened.
        advice: What to do; empty if nothing.
    """

    name: str
    normal: bool
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.advice}".rstrip()


def scale_text(scale: float) -> str:
    """Returns a loss scale as people say it: large powers of two as such.

    Example:
        >>> scale_text(1024.0), scale_text(2.0**27), scale_text(0.125), scale_text(3e9)
        ('1024', '2^27', '0.125', '3e+09')
    """
    mantissa, exponent = math.frexp(scale)
    return f"2^{exponent - 1}" if mantissa == 0.5 and exponent > 17 else f"{scale:g}"


@dataclass(frozen=True)
class Past:
    """An earlier step.

    Attributes:
        scale: The loss scale of it.
        skipped: Whether it was skipped.
        norm: Of its gradients, unscaled.
    """

    scale: float
    skipped: bool
    norm: float


@dataclass(frozen=True)
class Facts:
    """Everything that a verdict is based on.

    Attributes:
        findings: The gradients, in the order of the parameters.
        scaling: How the loss is scaled; None if somebody else's scale overflowed.
        scale: The loss scale of the step.
        next_scale: That of the next; None likewise.
        loss: The loss before it was scaled; None if nobody knows.
        past: Steps before, oldest first.
        clean_before: Steps before that were not skipped, also those that `past` has forgotten.
        bad_weights: Names of weights that are not finite.
        large_weights: Names of float16 weights of 2^15 and more.
        bad_buffers: Names of the model's buffers that something made not finite.
    """

    findings: Sequence[Finding]
    scaling: LossScale | None
    scale: float
    next_scale: float | None
    loss: float | None
    past: Sequence[Past]
    clean_before: int
    bad_weights: Sequence[str] = field(default=())
    large_weights: Sequence[str] = field(default=())
    bad_buffers: Sequence[str] = field(default=())


def verdict_on(facts: Facts) -> Verdict:
    """Returns the first verdict that fits.

    Example:
        >>> finding = Finding("w", (1,), "float16", ("+inf",), (0,), math.inf, None, None)
        >>> scaling = DynamicLossScale(2.0**16)
        >>> str(verdict_on(Facts([finding], scaling, 2.0**16, 2.0**15, 1.0, [], 0)))
        'The search for a loss scale has begun: 65536 is too high, 32768 is next. Nothing is wrong.'
    """
    rules = (
        _damaged,
        _forward,
        _other,
        _floor,
        _static,
        _searching,
        _probing,
        _not_a_number,
        _spike,
    )
    for rule in rules:
        verdict = rule(facts)
        if verdict is not None:
            return verdict
    raise AssertionError("the last rule fits everything")


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _damaged(facts: Facts) -> Verdict | None:
    if facts.bad_weights:
        return Verdict(
            "weights",
            False,
            f"Weights are not finite: {_names(facts.bad_weights)}.",
            "Skipping cannot mend that: go back to a checkpoint, and look at what wrote to them.",
        )
    if facts.bad_buffers:
        return Verdict(
            "buffers",
            False,
            f"Buffers of the model are not finite: {_names(facts.bad_buffers)}.",
            "A forward pass that overflowed has probably written to them, and a skipped step does "
            "not undo that: go back to a checkpoint, or reset them (BatchNorm: "
            "reset_running_stats()).",
        )
    if facts.large_weights:
        return Verdict(
            "saturated",
            False,
            f"float16 weights are close to its largest number, 65504: "
            f"{_names(facts.large_weights)}.",
            "No loss scale can help. Use bfloat16, weight decay, or a lower learning rate.",
        )
    return None


def _forward(facts: Facts) -> Verdict | None:
    if facts.loss is None or math.isfinite(facts.loss):
        return None
    return Verdict(
        "forward",
        False,
        f"The loss was {facts.loss} before it was scaled: the forward pass overflowed, or the "
        "batch was not finite.",
        "No loss scale can help. mpcore.trace_overflow(model, batch, ...) names the first module.",
    )


def _floor(facts: Facts) -> Verdict | None:
    floor = getattr(facts.scaling, "min_scale", None)
    if floor is None or facts.scale > floor:
        return None
    return Verdict(
        "floor",
        False,
        f"The loss scale is at its minimum, {scale_text(floor)}, and a gradient overflows all the "
        "same.",
        "Lower min_scale if the loss is large; otherwise look for its source with "
        "mpcore.trace_overflow(model, batch, ...).",
    )


def _other(facts: Facts) -> Verdict | None:
    if facts.scaling is not None:
        return None
    return Verdict(
        "other",
        True,
        f"Gradients overflowed: {_names(_bad(facts))}. Their loss scale is not the optimizer's "
        "own (an outside scaler, or a loss of add_loss): nobody here tells a search from a spike.",
    )


def _static(facts: Facts) -> Verdict | None:
    if not isinstance(facts.scaling, StaticLossScale) or facts.clean_before:
        return None
    return Verdict(
        "static",
        False,
        f"A loss scale of {scale_text(facts.scale)}, which never moves, was too high for the "
        "first step.",
        "Lower it, or use mpcore.DynamicLossScale().",
    )


def _searching(facts: Facts) -> Verdict | None:
    if not isinstance(facts.scaling, (DynamicLossScale, HeadroomLossScale)):
        return None
    begun = facts.clean_before > 0
    after = "it goes down if that happens again"  # with hysteresis, or a tolerance
    if facts.next_scale is not None and facts.next_scale != facts.scale:
        after = f"{scale_text(facts.next_scale)} is next"
    # after a resume the history is short, and what it lacks was clean
    if begun and (_proven(facts) >= _FEW or facts.clean_before >= _PROVEN or _has_grown(facts)):
        return None
    return Verdict(
        "search",
        True,
        f"The search for a loss scale {'goes on' if begun else 'has begun'}: "
        f"{scale_text(facts.scale)} is too high, {after}. Nothing is wrong.",
    )


def _probing(facts: Facts) -> Verdict | None:
    if not isinstance(facts.scaling, DynamicLossScale) or not _has_grown(facts):
        return None
    interval = facts.scaling.growth_interval
    if _proven(facts) >= max(min(interval, _PROVEN), _FEW):
        return None
    return Verdict(
        "probe",
        True,
        f"The loss scale had grown to {scale_text(facts.scale)} to find out whether that is too "
        f"high; it is. Expected about every {interval} steps. Nothing is wrong.",
    )


def _proven(facts: Facts) -> int:
    """Returns how many steps were clean at this scale or a higher one."""
    return sum(not past.skipped and past.scale >= facts.scale for past in facts.past)


def _has_grown(facts: Facts) -> bool:
    scales = [past.scale for past in facts.past] + [facts.scale]
    return any(later > earlier for earlier, later in pairwise(scales))


def _bad(facts: Facts) -> list[str]:
    return [finding.name for finding in facts.findings if not finding.finite]


def _not_a_number(facts: Facts) -> Verdict | None:
    kinds = {kind for finding in facts.findings for kind in finding.kinds}
    if kinds != {"NaN"} or facts.clean_before == 0:
        return None
    return Verdict(
        "nan",
        False,
        "Gradients are NaN and none is infinite, at a loss scale that had proven itself: probably "
        "no overflow, so no loss scale can help.",
        "mpcore.trace_overflow(model, batch, ...) names the first module.",
    )


def _spike(facts: Facts) -> Verdict:
    norms = [past.norm for past in facts.past if not past.skipped and math.isfinite(past.norm)]
    usual = (
        f" The usual norm of the gradients is {sorted(norms)[len(norms) // 2]:.3g}."
        if norms
        else ""
    )
    before = ", at which steps were clean before" if facts.clean_before else " in the first step"
    return Verdict(
        "spike",
        False,
        f"A spike: gradients overflowed at a loss scale of {scale_text(facts.scale)}{before}: "
        f"{_names(_bad(facts))}.{usual}",
        "One now and then is harmless, since the step was skipped. If they go on: look at the "
        "batch, lower the learning rate, or clip.",
    )
