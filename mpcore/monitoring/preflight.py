"""`preflight`: one float32 step that tells what 16 bits would do to a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.errors import ArgumentError
from mpcore.monitoring.probe import run_and_visit
from mpcore.monitoring.ranges import Range, limit_of, range_of

_SPARE_BITS = 2
_LARGEST_SCALE = 2.0**32
_TOO_MANY = 0.01  # share of lost gradients that is worth another format
_SHOWN = 8
_SLIGHT = 3  # rank of a problem that is none of the graver kinds


@dataclass(frozen=True)
class Preflight:
    """What a step in float32 says about 16 bits. `str(preflight)` is for people, and is short.

    Attributes:
        ranges: Weights, activations and gradients in the order in which they appeared.
        dtype: The format to use: float16, bfloat16, or float32 if neither of them holds all. It is
            chosen by what would overflow, and by the gradients that would be lost if they are more
            than 1 % of all. `problems` has those as well that do not matter as much.
        loss_scale: The scale to start from; 1 for bfloat16 and float32.
        reason: Why.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> found = preflight(model, torch.full((1, 2), 1e5), lambda out: out.sum())
        >>> found.dtype, [one.kind for one in found.problems(torch.float16)]
        (torch.bfloat16, ['activation', 'weight gradient'])
    """

    ranges: tuple[Range, ...]
    dtype: torch.dtype
    loss_scale: float
    reason: str

    def problems(self, dtype: torch.dtype, loss_scale: float = 1.0) -> list[Range]:
        """Returns everything of which a format would overflow or flush to 0 any share at all.

        First comes what is infinite in float32 already, then what overflows, then what loses more
        than 1 %, then the rest; among equals those that appeared first.

        Args:
            dtype: float16 or bfloat16.
            loss_scale: Multiplies gradients.

        Raises:
            ArgumentError: It is another format.
        """
        found = []
        for one in self.ranges:
            scale = one.scaled_by(loss_scale)
            if one.infinite or one.overflows(dtype, scale) or one.flushes(dtype, scale):
                found.append(one)
        return sorted(found, key=lambda one: _rank(one, dtype, loss_scale))

    def __str__(self) -> str:
        scale = f", loss scale {self.loss_scale:g}" if self.loss_scale != 1 else ""
        lines = [f"Use {_short(self.dtype)}{scale}: {self.reason}"]
        formats = dict.fromkeys([(torch.float16, 1.0), (torch.bfloat16, 1.0)])
        if self.dtype != torch.float32:
            formats[self.dtype, self.loss_scale] = None
        for dtype, used in formats:
            lines += self._listed(dtype, used)
        return "\n".join(lines)

    def _listed(self, dtype: torch.dtype, loss_scale: float) -> list[str]:
        problems = self.problems(dtype, loss_scale)
        grave = sum(_rank(one, dtype, loss_scale) < _SLIGHT for one in problems)
        name = _short(dtype)
        lines = [f"  {name} with a loss scale of {loss_scale:g}: {len(problems)} problems"]
        if problems:
            lines[0] += f", {grave} of them infinite, too large or more than 1 % lost"
        lines += [
            f"    {p.kind} {p.name or '(the model)'}: {p.smallest:.3g} to {p.largest:.3g}, "
            f"{_shares(p, dtype, loss_scale)}"
            for p in problems[:_SHOWN]
        ]
        if len(problems) > _SHOWN:
            more = len(problems) - _SHOWN
            lines.append(f"    and {more} more: see problems(torch.{name}, {loss_scale:g})")
        return lines


def _rank(one: Range, dtype: torch.dtype, loss_scale: float) -> int:
    scale = one.scaled_by(loss_scale)
    if one.infinite:
        return 0
    if one.overflows(dtype, scale):
        return 1
    return 2 if one.flushed(dtype, scale) > _TOO_MANY else _SLIGHT


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shares(one: Range, dtype: torch.dtype, loss_scale: float) -> str:
    scale = one.scaled_by(loss_scale)
    # weights are never made infinite: cast_model refuses them, and a step clamps them
    too_large = "too large" if one.kind == "weight" else "infinite"
    text = (
        f"{_percent(one.overflowing(dtype, scale))} {too_large}, "
        f"{_percent(one.flushed(dtype, scale))} lost"
    )
    return f"{one.infinite} values infinite in float32, {text}" if one.infinite else text


def _percent(share: float) -> str:
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def preflight(model: nn.Module, batch: Any, loss_of: Callable[[Any], Tensor]) -> Preflight:
    """Runs one step in float32 and recommends a format and a first loss scale; syncs many times.

    It lists all of which float16 or bfloat16 would overflow or flush anything to 0: see
    `Preflight.problems`. What a module computes between its inner modules it does not see.

    The model stays as it was, weights included: nothing is stepped.

    Args:
        model: In float32.
        batch: A tensor, a tuple of positional or a dictionary of keyword arguments.
        loss_of: Returns the loss from the model's output.

    Raises:
        ArgumentError: A parameter is not float32, or a value is NaN: `trace_overflow` then says
            where that began.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> found = preflight(model, torch.ones(8, 4), lambda out: out.square().mean())
        >>> found.dtype, found.loss_scale > 1
        (torch.float16, True)
    """
    other = [name for name, p in model.named_parameters() if p.dtype != torch.float32]
    if other:
        raise ArgumentError(
            f"model: expected float32 parameters, got others: {other[0]}. Run it before casting."
        )
    ranges = _look(model, batch, loss_of)
    return Preflight(tuple(ranges), *_recommended(ranges))


def _look(model: nn.Module, batch: Any, loss_of: Callable[[Any], Tensor]) -> list[Range]:
    """Runs a step and returns the range of everything."""
    ranges = [range_of("weight", name, [param]) for name, param in model.named_parameters()]
    masked: set[int] = set()  # ranges of activations whose infinities are all negative
    losses: list[bool] = []

    def visit(phase: str, name: str, what: Any, into: list[Tensor], out: list[Tensor]) -> None:
        if phase == "forward":
            ranges.append(range_of("activation", name, out))
            if not any(bool(torch.isposinf(tensor).any()) for tensor in out):
                masked.add(len(ranges) - 1)
        elif phase == "loss":
            losses.extend(bool(torch.isfinite(tensor).all()) for tensor in out)
        elif phase == "backward" and what is not loss_of:  # whose gradient is always float32
            ranges.append(range_of("gradient", name, into))

    def after() -> None:
        ranges.extend(
            range_of("weight gradient", name, [param.grad])
            for name, param in model.named_parameters()
            if param.grad is not None
        )

    run_and_visit(model, batch, loss_of, visit, after=after)
    if not all(losses):
        return ranges
    return [replace(one, infinite=0) if i in masked else one for i, one in enumerate(ranges)]


def _recommended(ranges: Sequence[Range]) -> tuple[torch.dtype, float, str]:
    infinite = next((one for one in ranges if one.infinite), None)
    if infinite is not None:
        return (
            torch.float32,
            1.0,
            f"{_named(infinite)} is infinite in it already ({infinite.infinite} values), so that "
            "no 16-bit format holds it either. Find out why first.",
        )
    worst = max((one for one in ranges if "gradient" not in one.kind), key=lambda one: one.largest)
    limit = torch.finfo(torch.float16).max
    if worst.largest > limit / 2**_SPARE_BITS:
        return _bfloat16_or_more(
            ranges, f"{_named(worst)} reaches {worst.largest:.3g}, and float16 ends at {limit:g}."
        )
    gradients = [one for one in ranges if "gradient" in one.kind]
    peak = max((one.largest for one in gradients), default=0.0)
    if peak == 0:
        return torch.float16, 1.0, "there were no gradients but zeros: try another batch."
    fits = 2.0 ** (15 - _SPARE_BITS - math.floor(math.log2(peak)))
    scale = min(max(fits, 1.0), _LARGEST_SCALE)
    lost = _lost(gradients, torch.float16, scale)
    if lost > _TOO_MANY or fits < 1:
        smallest = min(one.smallest for one in gradients if one.largest)
        return _bfloat16_or_more(
            ranges,
            f"gradients reach from {smallest:.3g} to {peak:.3g}, too far for float16 at any scale "
            f"({lost:.1%} would be lost).",
        )
    return (
        torch.float16,
        scale,
        f"nothing overflows, and {_percent(lost)} of the gradients are lost; the largest, "
        f"{peak:.3g}, has {_SPARE_BITS} bits to spare.",
    )


def _bfloat16_or_more(ranges: Sequence[Range], reason: str) -> tuple[torch.dtype, float, str]:
    """Returns bfloat16 if it holds everything, else float32.

    Args:
        ranges: All of them.
        reason: Why it is not float16.
    """
    above = next((one for one in ranges if one.overflows(torch.bfloat16)), None)
    if above is not None:
        return (
            torch.float32,
            1.0,
            f"{reason} {_named(above)} is too large for bfloat16 as well ({above.largest:.6g}; "
            f"from {limit_of(torch.bfloat16):.6g} on numbers are rounded to infinity). Rescale "
            "what problems(torch.bfloat16) lists, or keep its modules in float32 (keep_fp32).",
        )
    lost = _lost([one for one in ranges if "gradient" in one.kind], torch.bfloat16, 1.0)
    if lost > _TOO_MANY:
        return (
            torch.float32,
            1.0,
            f"{reason} bfloat16 would lose {lost:.1%} of the gradients: multiply the loss.",
        )
    return torch.bfloat16, 1.0, reason


def _lost(gradients: Sequence[Range], dtype: torch.dtype, scale: float) -> float:
    counts = [sum(one.exponents.values()) for one in gradients]
    lost = sum(
        one.flushed(dtype, scale) * count for one, count in zip(gradients, counts, strict=True)
    )
    return lost / max(sum(counts), 1)


def _named(one: Range) -> str:
    return f"{one.kind} {one.name or '(the model)'}"
