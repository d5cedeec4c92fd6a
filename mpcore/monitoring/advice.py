"""Which format and which loss scale: what follows from the sizes of everything, and from trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mpcore.monitoring.ranges import Range, limit_of
from mpcore.monitoring.trial import Trial

_SPARE_BITS = 2
_LARGEST_SCALE = 2.0**32
#: Share of lost gradients that is worth another format.
TOO_MANY = 0.01
_LOWER = 2.0**4  # by how much a loss scale falls at which a gradient overflowed
#: What a format has to hold by itself; of the rest a step that is run tells whether it does harm.
_CERTAIN = ("weight", "activation")


class Choice(NamedTuple):
    """A format, the loss scale to start from, and why."""

    dtype: torch.dtype
    loss_scale: float
    reason: str


def recommended(ranges: Sequence[Range], *, tried: bool) -> Choice:
    """Returns what follows from sizes.

    Args:
        ranges: Of a step in float32.
        tried: Whether a step is going to show what only the sizes of weights, of what modules
            return, and of gradients, do not tell.

    Example:
        >>> one = Range("activation", "l", 1e5, 1e5, {16: 1})
        >>> recommended([one], tried=True).dtype
        torch.bfloat16
    """
    infinite = next((one for one in ranges if one.infinite), None)
    if infinite is not None:
        return Choice(
            torch.float32,
            1.0,
            f"{_named(infinite)} is infinite in it already ({infinite.infinite} values), so that "
            "no 16-bit format holds it either. Find out why first.",
        )
    certain = [one for one in ranges if _counts(one, tried=tried)]
    held = [one for one in certain if "gradient" not in one.kind]
    limit = torch.finfo(torch.float16).max
    worst = max(held, key=lambda one: one.largest, default=None)
    if worst is not None and worst.largest > limit / 2**_SPARE_BITS:
        reason = f"{_named(worst)} reaches {worst.largest:.3g}, and float16 ends at {limit:g}."
        return _bfloat16_or_more(certain, reason)
    return _by_gradients(certain)


def _counts(one: Range, *, tried: bool) -> bool:
    return "gradient" in one.kind or not tried or (one.kind in _CERTAIN and not one.between)


def _by_gradients(certain: Sequence[Range]) -> Choice:
    """Returns float16 with a loss scale at which gradients fit, or another format."""
    gradients = [one for one in certain if "gradient" in one.kind]
    peak = max((one.largest for one in gradients), default=0.0)
    if peak == 0:
        return Choice(torch.float16, 1.0, "there were no gradients but zeros: try another batch.")
    fits = 2.0 ** (15 - _SPARE_BITS - math.floor(math.log2(peak)))
    scale = min(max(fits, 1.0), _LARGEST_SCALE)
    lost = lost_share(gradients, torch.float16, scale)
    if lost > TOO_MANY or fits < 1:
        smallest = min(one.smallest for one in gradients if one.largest)
        far = (
            "too far for float16 at any scale" if lost > TOO_MANY else "which needs a scale below 1"
        )
        reason = (
            f"gradients reach from {smallest:.3g} to {peak:.3g}, {far} ({lost:.1%} would be lost)."
        )
        return _bfloat16_or_more(certain, reason)
    return Choice(
        torch.float16,
        scale,
        f"nothing overflows, and {percent(lost)} of the gradients are lost; the largest, "
        f"{peak:.3g}, has {_SPARE_BITS} bits to spare.",
    )


def after_trial(choice: Choice, trial: Trial, ranges: Sequence[Range]) -> Choice:
    """Returns the choice if the step was as it should, else the next.

    Args:
        choice: What was tried.
        trial: How it went.
        ranges: Of a step in float32.

    Example:
        >>> wrong = Trial(torch.bfloat16, 1.0, wrong="the loss is 1, and 2 in float32")
        >>> after_trial(Choice(torch.bfloat16, 1.0, "Why."), wrong, []).reason
        'Why. bfloat16 does not do: the loss is 1, and 2 in float32.'
    """
    if trial.untried:
        alone = recommended(ranges, tried=False)
        return alone._replace(reason=f"{alone.reason} Not tried: {trial.untried}")
    if not trial.wrong:
        return choice
    wrong = f"{short(choice.dtype)} does not do: {trial.wrong}."
    certain = [one for one in ranges if _counts(one, tried=True)]
    if choice.dtype == torch.bfloat16:
        return Choice(torch.float32, 1.0, f"{choice.reason} {wrong}")
    if not trial.overflowed_back or choice.loss_scale == 1:
        return _bfloat16_or_more(certain, wrong)
    lower = max(choice.loss_scale / _LOWER, 1.0)
    gradients = [one for one in certain if "gradient" in one.kind]
    lost = lost_share(gradients, torch.float16, lower)
    if lost > TOO_MANY:
        return _bfloat16_or_more(certain, f"{wrong} At a lower scale {lost:.1%} would be lost.")
    return Choice(
        torch.float16,
        lower,
        f"nothing overflows, and {percent(lost)} of the gradients are lost; at a loss scale of "
        f"{choice.loss_scale:g} {trial.wrong}.",
    )


def _bfloat16_or_more(certain: Sequence[Range], reason: str) -> Choice:
    """Returns bfloat16 if it holds everything, else float32.

    Args:
        certain: What it has to hold.
        reason: Why it is not float16.
    """
    above = next((one for one in certain if one.overflows(torch.bfloat16)), None)
    if above is not None:
        return Choice(
            torch.float32,
            1.0,
            f"{reason} {_named(above)} is too large for bfloat16 as well ({above.largest:.6g}; "
            f"from {limit_of(torch.bfloat16):.6g} on numbers are rounded to infinity). Rescale "
            "what problems(torch.bfloat16) lists, or keep its modules in float32 (keep_fp32).",
        )
    gradients = [one for one in certain if "gradient" in one.kind]
    lost = lost_share(gradients, torch.bfloat16, 1.0)
    if lost > TOO_MANY:
        return Choice(
            torch.float32,
            1.0,
            f"{reason} bfloat16 would lose {lost:.1%} of the gradients: multiply the loss.",
        )
    return Choice(torch.bfloat16, 1.0, reason)


def lost_share(gradients: Sequence[Range], dtype: torch.dtype, scale: float) -> float:
    """Returns which share of all values that are not 0 would become 0.

    Example:
        >>> one = Range("gradient", "l", 1.0, 2.0**-30, {0: 3, -30: 1})
        >>> lost_share([one], torch.float16, 1.0)
        0.25
    """
    counts = [sum(one.exponents.values()) for one in gradients]
    lost = sum(
        one.flushed(dtype, scale) * count for one, count in zip(gradients, counts, strict=True)
    )
    return lost / max(sum(counts), 1)


def _named(one: Range) -> str:
    return f"{one.kind} {one.name or '(the model)'}"


def short(dtype: torch.dtype) -> str:
    """Returns the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def percent(share: float) -> str:
    """Returns a share as people read it.

    Example:
        >>> percent(0.0001), percent(0.25)
        ('<0.1%', '25.0%')
    """
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}"
