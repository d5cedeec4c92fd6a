"""`trace_overflow`: runs a failing batch once more and names the first module that went wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

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
        first: The first frame where something finite went in and something else came out, or the
            batch, if all would be well without what is not finite in it. None if the loss and the
            gradients are finite: a softmax makes a mask's infinities finite, for example.
    """

    frames: tuple[Frame, ...]
    first: Frame | None

    def __str__(self) -> str:
        if self.first is None:
            return self._nothing_wrong()
        at = self.frames.index(self.first)
        lines = [f"First in the {self.first.phase} pass: {self.first.module or '(the model)'}"]
        for i in range(max(0, at - _SHOWN), min(len(self.frames), at + 3)):
            lines.append(f"{'->' if i == at else '  '} {self.frames[i]}")
        return "\n".join(lines)

    def _nothing_wrong(self) -> str:
        odd = next((frame for frame in self.frames if not frame.finite_out), None)
        if odd is None:
            return "All activations and gradients are finite."
        return f"Nothing went wrong: what is not finite was made finite later. First of it:\n{odd}"


def trace_overflow(
    model: nn.Module,
    batch: Any,
    loss_of: Callable[[Any], Tensor],
    *,
    loss_scale: float = 1.0,
) -> Trace:
    """Runs `batch` through `model` and back, and looks at every module; syncs many times.

    The model is left as it was: gradients, buffers, hooks; and random number generators. A batch
    that is not finite is run again with finite numbers in place, to see whether it is to blame.

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
    spare = _changed(batch, torch.clone)  # now: modules may write to what they are given

    def run(given: Any) -> list[Frame]:
        return _frames_of(model, given, loss_of, loss_scale)

    frames = run(batch)
    first = _first(frames)
    if first is not None and not frames[0].finite_out:
        # what a finite loss came from acts as a mask does: large numbers do the same
        tame = _with_ones if _is_lost(frames) else _with_large_numbers
        first = _first_but_for_batch(frames, first, run(_changed(spare, tame)))
    return Trace(tuple(frames), first)


def _frames_of(
    model: nn.Module, batch: Any, loss_of: Callable[[Any], Tensor], loss_scale: float
) -> list[Frame]:
    frames: list[Frame] = []

    def visit(phase: str, name: str, what: Any, into: list[Tensor], out: list[Tensor]) -> None:
        finite_in, largest_in = _look(into)
        finite_out, largest_out = _look(out)
        kind = getattr(what, "__name__", type(what).__name__)
        frame = Frame(
            phase,
            name,
            kind,
            largest_in=largest_in,
            largest_out=largest_out,
            finite_in=finite_in,
            finite_out=finite_out,
        )
        frames.append(frame)

    run_and_visit(model, batch, loss_of, visit, loss_scale=loss_scale)
    return frames


def _changed(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns a copy whose floating tensors were changed."""

    def copied(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        return change(leaf.detach()).requires_grad_(leaf.requires_grad)

    return tree_map(copied, dict(batch) if isinstance(batch, Mapping) else batch)


def _with_ones(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor, nan=1.0, posinf=1.0, neginf=-1.0)


def _with_large_numbers(tensor: Tensor) -> Tensor:
    bound = torch.finfo(tensor.dtype).max / 4  # to which a module can add something
    return torch.nan_to_num(tensor, nan=1.0, posinf=bound, neginf=-bound)


def _first(frames: Sequence[Frame]) -> Frame | None:
    """Returns the first frame that went wrong, whatever the batch was like.

    If the loss is finite, what was not finite on the way to it was meant, as a mask's infinities
    are, or did no harm: then only the backward pass counts.
    """
    back = [frame for frame in frames if frame.phase == "backward"]
    if not _is_lost(frames):
        return _source(back)
    there = [frame for frame in frames if frame.phase in ("forward", "loss")]
    # the first of all, if modules made finite what they got, and it was not that which did harm
    sources = filter(_is_source, (*there, *back))
    return _source(there) or next(sources, None)


def _source(frames: Sequence[Frame]) -> Frame | None:
    """Returns the first source of what no later module made finite."""
    found: Frame | None = None
    for frame in frames:
        if found is None:
            found = frame if _is_source(frame) else None
        elif not frame.finite_in and frame.finite_out:
            found = None
    return found


def _first_but_for_batch(
    frames: Sequence[Frame], first: Frame, tamed: Sequence[Frame]
) -> Frame | None:
    """Returns the batch's frame if it did the harm, else the frame that did.

    Args:
        frames: Of the batch.
        first: What went wrong first in them.
        tamed: Frames of the same batch with finite numbers in place of all others.
    """
    found = _first(tamed)
    if found is None or (_is_lost(frames) and not _is_lost(tamed)):
        return frames[0]
    if _is_lost(tamed) and not _is_lost(frames):
        return first  # the numbers in place did other harm
    at = tamed.index(found)
    same = frames[at] if at < len(frames) else first
    return same if (same.phase, same.module) == (found.phase, found.module) else first


def _is_source(frame: Frame) -> bool:
    return frame.finite_in and not frame.finite_out


def _is_lost(frames: Sequence[Frame]) -> bool:
    return any(frame.phase == "loss" and not frame.finite_out for frame in frames)


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
