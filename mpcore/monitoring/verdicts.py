"""Why a step was skipped, in words: rules over what is known, most certain first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpcore.monitoring.facts import FEW, PROVEN, Facts

#: by how much the scale falls before gradients that stay NaN alone are no longer a search's
_FALL = 2.0**4
_TRACE = "mpcore.trace_overflow(model, batch, ...) names the first operation."
#: of a scaled loss below it gradients hardly ever overflow: float16 goes up to 2^16
_SMALL = 2.0**15


def first_few(names: Sequence[str]) -> str:
    """Returns three of them, and how many more there are.

    Example:
        >>> first_few("abcde")
        'a, b, c and 2 more'
    """
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


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


def verdict_on(facts: Facts) -> Verdict:
    """Returns the first verdict that fits.

    Example:
        >>> from mpcore.monitoring.findings import Finding
        >>> finding = Finding("w", (1,), "float16", ("+inf",), (0,), math.inf, None, None)
        >>> from mpcore import DynamicLossScale
        >>> scaling = DynamicLossScale(2.0**16)
        >>> str(verdict_on(Facts([finding], scaling, 2.0**16, 2.0**15, [], [], 0)))
        'The search for a loss scale has begun: 65536 is too high, 32768 is next. Nothing is wrong.'
    """
    rules = (
        _damaged,
        _saturated,
        _forward,
        _elsewhere,
        _other,
        _always_nan,
        _floor,
        _static,
        _outlier,
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


def _damaged(facts: Facts) -> Verdict | None:
    if facts.bad_weights:
        return Verdict(
            "weights",
            False,
            f"Weights are not finite: {first_few(facts.bad_weights)}.",
            "Skipping cannot mend that: go back to a checkpoint, and look at what wrote to them.",
        )
    if facts.bad_buffers:
        return Verdict(
            "buffers",
            False,
            f"Buffers of the model are not finite: {first_few(facts.bad_buffers)}.",
            "A forward pass that overflowed has probably written to them, and a skipped step does "
            "not undo that: go back to a checkpoint, or reset them (BatchNorm: "
            "reset_running_stats()).",
        )
    return None


def _saturated(facts: Facts) -> Verdict | None:
    if not facts.large_weights:
        return None
    # a lower scale helps a search, however large a weight; at the floor there is none
    usual = facts.lost() is None and facts.spiked() is None
    if usual and not _floor(facts) and (_static(facts) or _searching(facts) or _probing(facts)):
        return None
    return Verdict(
        "saturated",
        False,
        "float16 weights are close to its largest number, 65504: "
        f"{first_few(facts.large_weights)}.",
        "No loss scale can help. Use bfloat16, weight decay, or a lower learning rate.",
    )


def _forward(facts: Facts) -> Verdict | None:
    number = facts.lost()
    if number is None:
        return None
    loss = facts.loss_of(number)
    return Verdict(
        "forward",
        False,
        f"T{loss[1:]} was {facts.losses[number].value} before it was scaled: the forward pass "
        "overflowed, or the batch was not finite.",
        "No loss scale can help. mpcore.trace_overflow(model, batch, ...) names the first "
        "operation.",
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


def _elsewhere(facts: Facts) -> Verdict | None:
    if facts.bad():
        return None
    return Verdict(
        "elsewhere",
        True,
        "No gradient of this rank overflowed, but one of another rank, which says more.",
    )


def _other(facts: Facts) -> Verdict | None:
    if facts.scaling is not None:
        return None
    return Verdict(
        "other",
        True,
        f"Gradients overflowed: {first_few(facts.bad())}. Their loss scale is not the optimizer's "
        "own (an outside scaler, or a loss of add_loss): nobody here tells a search from a spike.",
    )


def _static(facts: Facts) -> Verdict | None:
    scaling = facts.scaling
    if scaling is None or scaling.moves or not scaling.scales or facts.clean_before:
        return None
    return Verdict(
        "static",
        False,
        f"A loss scale of {scale_text(facts.scale)}, which never moves, was too high for the "
        "first step.",
        "Lower it, or use mpcore.DynamicLossScale().",
    )


def _searching(facts: Facts) -> Verdict | None:
    if facts.scaling is None or not facts.scaling.moves:
        return None
    begun = facts.clean_before > 0
    after = "it goes down if that happens again"  # with hysteresis, or a tolerance
    if facts.next_scale is not None and facts.next_scale != facts.scale:
        after = f"{scale_text(facts.next_scale)} is next"
    # after a resume the history is short, and what it lacks was clean
    if begun and (facts.proven() >= FEW or facts.clean_before >= PROVEN or facts.has_grown()):
        return None
    return Verdict(
        "search",
        True,
        f"The search for a loss scale {'goes on' if begun else 'has begun'}: "
        f"{scale_text(facts.scale)} is too high, {after}. Nothing is wrong.",
    )


def _probing(facts: Facts) -> Verdict | None:
    interval = None if facts.scaling is None else facts.scaling.growth_interval
    if interval is None or not facts.has_grown():
        return None
    if facts.proven() >= max(min(interval, PROVEN), FEW):
        return None
    return Verdict(
        "probe",
        True,
        f"The loss scale had grown to {scale_text(facts.scale)} to find out whether that is too "
        f"high; it is. Expected about every {interval} steps. Nothing is wrong.",
    )


def _always_nan(facts: Facts) -> Verdict | None:
    """An overflow that the scale has fallen so far below would have shown an infinity by now."""
    since = facts.nan_since
    if since is None or since < facts.scale * _FALL:
        return None
    largest = facts.largest_loss()
    if largest is None or largest * facts.scale > _SMALL:
        return None
    return Verdict(
        "nan",
        False,
        f"The same gradients were NaN and none was infinite at each loss scale from "
        f"{scale_text(since)} down to {scale_text(facts.scale)}, while others were finite: "
        f"{first_few(facts.bad())}{facts.where()}. Probably the backward pass makes a NaN, and no "
        "loss scale can help.",
        _TRACE,
    )


def _not_a_number(facts: Facts) -> Verdict | None:
    if not facts.only_nan() or facts.clean_before == 0:
        return None
    known = [facts.usual_loss(one.name) for one in facts.losses]
    loss = ", and the loss was not unusual" if known and None not in known else ""
    return Verdict(
        "nan",
        False,
        f"Gradients are NaN{facts.where()} and none is infinite, at a loss scale that had proven "
        f"itself{loss}. Probably the backward pass makes a NaN, and no loss scale can help; an "
        "overflow in it (inf - inf) is possible too.",
        f"{_TRACE} With loss_scale=report.loss_scale it finds an overflow as well. Look at the "
        "batch, too.",
    )


def _outlier(facts: Facts) -> Verdict | None:
    return None if facts.spiked() is None else _spike(facts)


def _spike(facts: Facts) -> Verdict:
    norms = [past.norm for past in facts.past if not past.skipped and math.isfinite(past.norm)]
    usual = (
        f" The usual norm of the gradients is {sorted(norms)[len(norms) // 2]:.3g}."
        if norms
        else ""
    )
    loss, number = "", facts.spiked()
    if number is not None:
        name, value = facts.losses[number]
        usual_loss = f"usually about {facts.usual_loss(name):.3g}"
        loss = f"{facts.loss_of(number)} was {value:.3g}, {usual_loss}, and "
    before = ", at which steps were clean before" if facts.proven() else ""
    return Verdict(
        "spike",
        False,
        f"A spike: {loss}gradients overflowed at a loss scale of {scale_text(facts.scale)}"
        f"{facts.where()}{before}: {first_few(facts.bad())}.{usual}",
        "One now and then is harmless, since the step was skipped. If they go on: look at the "
        "batch, lower the learning rate, or clip.",
    )
