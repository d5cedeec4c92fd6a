"""`preflight`: one float32 step that tells what 16 bits would do to a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.errors import ArgumentError
from mpcore.monitoring.probe import run_and_visit

#: per format: values from here on become infinite, values up to here become 0 (exponents of 2)
_EDGES = {torch.float16: (16, -25), torch.bfloat16: (128, -134)}
_SPARE_BITS = 2
_LARGEST_SCALE = 2.0**32
_TOO_MANY = 0.01  # share of lost gradients that is worth another format


@dataclass(frozen=True)
class Range:
    """The sizes of the values of one tensor, or of several of one module.

    Attributes:
        kind: "weight", "activation", "gradient" (of an activation) or "weight gradient".
        name: Of the parameter or module.
        largest: Largest magnitude; 0 if there are none but zeros.
        smallest: Smallest magnitude that is not 0.
        exponents: How many values have which binary exponent; zeros are left out.
    """

    kind: str
    name: str
    largest: float
    smallest: float
    exponents: dict[int, int]

    def scaled_by(self, loss_scale: float) -> float:
        """Returns what a loss scale multiplies these by: gradients alone."""
        return loss_scale if "gradient" in self.kind else 1.0

    def overflowing(self, dtype: torch.dtype, scale: float = 1.0) -> float:
        """Returns the share of values, zeros left out, that would become infinite.

        Args:
            dtype: float16 or bfloat16.
            scale: A power of two, what they are multiplied by first.
        """
        edge = _EDGES[dtype][0] - math.log2(scale)
        return self._share(lambda exponent: exponent >= edge)

    def flushed(self, dtype: torch.dtype, scale: float = 1.0) -> float:
        """Returns the share of values, zeros left out, that would become 0, likewise."""
        edge = _EDGES[dtype][1] - math.log2(scale)
        return self._share(lambda exponent: exponent < edge)

    def _share(self, chosen: Callable[[int], bool]) -> float:
        total = sum(self.exponents.values())
        return sum(n for e, n in self.exponents.items() if chosen(e)) / total if total else 0.0


@dataclass(frozen=True)
class Preflight:
    """What a step in float32 says about 16 bits. `str(preflight)` is for people.

    Attributes:
        ranges: Weights, activations and gradients in the order in which they appeared.
        dtype: The format to use: float16 or bfloat16.
        loss_scale: The scale to start from; 1 for bfloat16.
        reason: Why.
    """

    ranges: tuple[Range, ...]
    dtype: torch.dtype
    loss_scale: float
    reason: str

    def problems(self, dtype: torch.dtype, loss_scale: float = 1.0) -> list[Range]:
        """Returns what a format would make infinite, or more than 1 % of it 0.

        Args:
            dtype: float16 or bfloat16.
            loss_scale: Multiplies gradients.
        """
        found = []
        for one in self.ranges:
            scale = one.scaled_by(loss_scale)
            if one.overflowing(dtype, scale) or one.flushed(dtype, scale) > _TOO_MANY:
                found.append(one)
        return found

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        scale = f", loss scale {self.loss_scale:g}" if self.loss_scale != 1 else ""
        lines = [f"Use {name}{scale}: {self.reason}"]
        for dtype, used in ((torch.float16, 1.0), (self.dtype, self.loss_scale)):
            short = str(dtype).removeprefix("torch.")
            problems = self.problems(dtype, used)
            lines.append(f"  {short} with a loss scale of {used:g}: {len(problems)} problems")
            lines += [
                f"    {p.kind} {p.name or '(the model)'}: {p.smallest:.3g} to {p.largest:.3g}, "
                f"{_share_in(p, dtype, used)}"
                for p in problems[:8]
            ]
        return "\n".join(lines)


def _share_in(one: Range, dtype: torch.dtype, loss_scale: float) -> str:
    scale = one.scaled_by(loss_scale)
    return f"{one.overflowing(dtype, scale):.1%} infinite, {one.flushed(dtype, scale):.1%} lost"


def preflight(model: nn.Module, batch: Any, loss_of: Callable[[Any], Tensor]) -> Preflight:
    """Runs one step in float32 and recommends a format and a first loss scale; syncs many times.

    The model stays as it was, weights included: nothing is stepped.

    Args:
        model: In float32.
        batch: A tensor, a tuple of positional or a dictionary of keyword arguments.
        loss_of: Returns the loss from the model's output.

    Raises:
        ArgumentError: A parameter is not float32, or a value is NaN: `trace_overflow` then says
            where that began. Infinities, as masks have them, are left out.

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
    ranges = [_range("weight", name, [param]) for name, param in model.named_parameters()]

    def visit(phase: str, name: str, what: Any, into: list[Tensor], out: list[Tensor]) -> None:
        if phase == "forward":
            ranges.append(_range("activation", name, out))
        elif phase == "backward" and what is not loss_of:  # whose gradient is always float32
            ranges.append(_range("gradient", name, into))

    def after() -> None:
        ranges.extend(
            _range("weight gradient", name, [param.grad])
            for name, param in model.named_parameters()
            if param.grad is not None
        )

    run_and_visit(model, batch, loss_of, visit, after=after)
    return Preflight(tuple(ranges), *_recommended(ranges))


@torch.no_grad()
def _range(kind: str, name: str, tensors: Sequence[Tensor]) -> Range:
    flat = [tensor.detach().float().reshape(-1) for tensor in tensors]
    values = torch.cat(flat).abs() if flat else torch.zeros(0)
    if bool(torch.isnan(values).any()):
        raise ArgumentError(
            f"model: expected values without NaN in float32, got some: {kind} of "
            f"{name or 'the model'}. mpcore.trace_overflow(...) says where that began."
        )
    values = values[(values > 0) & (values < torch.inf)]
    if not values.numel():
        return Range(kind, name, 0.0, 0.0, {})
    exponents, counts = torch.unique(torch.frexp(values)[1] - 1, return_counts=True)
    by_exponent = dict(zip(exponents.tolist(), counts.tolist(), strict=True))
    return Range(kind, name, float(values.amax()), float(values.amin()), by_exponent)


def _recommended(ranges: Sequence[Range]) -> tuple[torch.dtype, float, str]:
    gradients = [one for one in ranges if "gradient" in one.kind]
    values = [one for one in ranges if "gradient" not in one.kind]
    worst = max(values, key=lambda one: one.largest)
    limit = torch.finfo(torch.float16).max
    if worst.largest > limit / 2**_SPARE_BITS:
        return (
            torch.bfloat16,
            1.0,
            f"{worst.kind} {worst.name or '(the model)'} reaches {worst.largest:.3g}, and float16 "
            f"ends at {limit:g}.",
        )
    peak = max((one.largest for one in gradients), default=0.0)
    if peak == 0:
        return torch.float16, 1.0, "there were no gradients but zeros."
    fits = 2.0 ** (15 - _SPARE_BITS - math.floor(math.log2(peak)))
    scale = min(max(fits, 1.0), _LARGEST_SCALE)
    total = sum(sum(one.exponents.values()) for one in gradients)
    lost = sum(one.flushed(torch.float16, scale) * sum(one.exponents.values()) for one in gradients)
    if lost > _TOO_MANY * total or fits < 1:
        return (
            torch.bfloat16,
            1.0,
            f"gradients reach from {min(o.smallest for o in gradients if o.largest):.3g} to "
            f"{peak:.3g}, too far for float16 at any scale ({lost / total:.1%} would be lost).",
        )
    return (
        torch.float16,
        scale,
        f"everything fits; the largest gradient, {peak:.3g}, has {_SPARE_BITS} bits to spare.",
    )
