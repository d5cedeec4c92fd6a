"""`trace_overflow`: runs a failing batch once more and names the first module that went wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.monitoring.probe import run_and_visit

_SHOWN = 8


@dataclass(frozen=True)
class Frame:
    """A module, as the batch went through it.

    Attributes:
        phase: "batch", "forward", "loss" or "backward".
        module: Its name, "" for the model itself.
        kind: Its class.
        largest_in: Largest finite magnitude of what went in: its inputs, or the gradients of its
            outputs. 0 if there was nothing.
        largest_out: Of what came out, likewise.
        finite_in: Whether all that went in was finite.
        finite_out: Whether all that came out was.
    """

    phase: str
    module: str
    kind: str
    largest_in: float
    largest_out: float
    finite_in: bool
    finite_out: bool

    def __str__(self) -> str:
        def side(finite: bool, largest: float) -> str:
            return f"{largest:.3g}" if finite else f"NOT FINITE (else up to {largest:.3g})"

        name = self.module or "(the model)"
        return (
            f"{self.phase:<8} {name} {self.kind}: in {side(self.finite_in, self.largest_in)}, "
            f"out {side(self.finite_out, self.largest_out)}"
        )


@dataclass(frozen=True)
class Trace:
    """What happened to a batch, in order.

    Attributes:
        frames: Every module of the forward pass, then every module of the backward pass.
        first: The first frame where something finite went in and something else came out; None if
            there is none, or if a later module made it finite again, as a softmax does with a mask.
    """

    frames: tuple[Frame, ...]
    first: Frame | None

    def __str__(self) -> str:
        if self.first is None:
            return "All activations and gradients are finite."
        at = self.frames.index(self.first)
        lines = [f"First in the {self.first.phase} pass: {self.first.module or '(the model)'}"]
        for i in range(max(0, at - _SHOWN), min(len(self.frames), at + 3)):
            lines.append(f"{'->' if i == at else '  '} {self.frames[i]}")
        return "\n".join(lines)


def trace_overflow(
    model: nn.Module,
    batch: Any,
    loss_of: Callable[[Any], Tensor],
    *,
    loss_scale: float = 1.0,
) -> Trace:
    """Runs `batch` through `model` and back, and looks at every module; syncs many times.

    The model is left as it was: gradients, buffers, hooks; and random number generators.

    Args:
        model: In the mode, dtypes and place in which it failed.
        batch: A tensor, a tuple of positional or a dictionary of keyword arguments.
        loss_of: Returns the loss from the model's output.
        loss_scale: What the loss is multiplied by in float32: `report.loss_scale`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = model[1].weight.fill_(1e38)
        >>> trace = trace_overflow(model, torch.full((1, 2), 1e3), lambda out: out.sum())
        >>> trace.first.phase, trace.first.module
        ('forward', '1')
    """
    frames: list[Frame] = []

    def visit(phase: str, name: str, what: Any, into: list[Tensor], out: list[Tensor]) -> None:
        finite_in, largest_in = _look(into)
        finite_out, largest_out = _look(out)
        kind = getattr(what, "__name__", type(what).__name__)
        frame = Frame(phase, name, kind, largest_in, largest_out, finite_in, finite_out)
        frames.append(frame)

    run_and_visit(model, batch, loss_of, visit, loss_scale=loss_scale)
    return Trace(tuple(frames), _first(frames))


def _first(frames: list[Frame]) -> Frame | None:
    """Returns the first frame that went wrong and stayed wrong.

    Infinities that a later module of the same pass turns into finite values were meant: those of an
    attention mask before its softmax.
    """
    found: Frame | None = None
    for frame in frames:
        if found is None:
            found = frame if _is_source(frame) else None
        elif frame.phase == found.phase and not frame.finite_in and frame.finite_out:
            found = None
    return found


def _is_source(frame: Frame) -> bool:
    return not frame.finite_out and (frame.finite_in or frame.phase == "batch")


def _look(tensors: list[Tensor]) -> tuple[bool, float]:
    """Returns whether all is finite, and the largest finite magnitude."""
    finite, largest = True, 0.0
    for tensor in tensors:
        if not tensor.numel():
            continue
        sizes = tensor.abs().double()
        good = torch.isfinite(sizes)
        finite = finite and bool(good.all())
        largest = max(largest, float(torch.where(good, sizes, 0.0).amax()))
    return finite, largest
