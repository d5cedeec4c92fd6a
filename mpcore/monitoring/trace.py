"""`trace_overflow`: runs a failing batch again and names the first operation that went wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.monitoring.nests import tensors_in, with_changed
from mpcore.monitoring.operations import Operation
from mpcore.monitoring.origins import Event, Origins, is_finite, kinds_of, largest_of
from mpcore.monitoring.probe import Probe

_SHOWN = 8


@dataclass(frozen=True)
class Frame:
    """A module, or an operation, as the batch went through it.

    Attributes:
        phase: "batch", "forward", "loss" or "backward".
        module: Its name, "" for the model itself; of an operation that of the innermost module
            around it.
        kind: Its class.
        largest_in: Largest finite magnitude of what went in: its inputs, or the gradients of its
            outputs. 0 if there was nothing.
        largest_out: Of what came out, likewise.
        finite_in: Whether all that went in was finite.
        finite_out: Whether all that came out was.
        operation: What torch calls it, and in the backward pass what is differentiated; "" for a
            module.
        line: The line of code that called it, or that called what is differentiated; "" if torch
            cannot tell.
        tensor: The weight, buffer or part of the batch that is to blame, "" if none is.
    """

    phase: str
    module: str
    kind: str
    largest_in: float
    largest_out: float
    finite_in: bool
    finite_out: bool
    operation: str = ""
    line: str = ""
    tensor: str = ""

    def __str__(self) -> str:
        def side(finite: bool, largest: float) -> str:
            return f"{largest:.3g}" if finite else f"NOT FINITE (else up to {largest:.3g})"

        what = self.operation or self.kind
        return (
            f"{self.phase:<8} {self.module or '(the model)'} {what}: "
            f"in {side(self.finite_in, self.largest_in)}, "
            f"out {side(self.finite_out, self.largest_out)}"
        )


@dataclass(frozen=True)
class Trace:
    """What happened to a batch, in order.

    Attributes:
        frames: Every module of the forward pass, then every module of the backward pass; among
            them, in its place, `first`.
        first: The first operation where something finite went in and something else came out, or
            the batch, if all would be well without what is not finite in it. None if the loss and
            the gradients are finite: a softmax makes a mask's infinities finite, for example.
    """

    frames: tuple[Frame, ...]
    first: Frame | None

    def __str__(self) -> str:
        first = self.first
        if first is None:
            return self._nothing_wrong()
        at = self.frames.index(first)
        doing = f", {first.operation}" if first.operation else ""
        lines = [f"First in the {first.phase} pass: {first.module or '(the model)'}{doing}"]
        lines += [f"  {first.line}"] if first.line else []
        lines += [f"  of the {first.tensor}"] if first.tensor else []
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
    """Runs `batch` through `model` and back, and looks at every operation; syncs many times.

    Also at those between modules, in the loss, in checkpoints and in custom backward passes. What a
    compiled kernel computes inside, and what does not go through torch, it does not see: then the
    first module is named that handed it on.

    The model is left as it was: gradients, weights, buffers, hooks; and random number generators.
    A batch that is not finite is run again with finite numbers in place, to see whether it is to
    blame.

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
        >>> trace.first.phase, trace.first.module, trace.first.operation
        ('forward', '1', 'addmm')
    """

    def run(given: Any) -> _Run:
        return _Run(model, given, loss_of, loss_scale)

    made = run(batch)
    if made.first is None or made.frames[0].finite_out:
        return Trace(tuple(made.frames), made.first)
    # what a finite loss came from acts as a mask does: large numbers do the same
    tamed = run(_changed(batch, _with_ones if made.lost else _with_large_numbers))
    if tamed.first is None or (made.lost and not tamed.lost):
        return _blaming_the_batch(made.modules, batch)
    if tamed.lost and not made.lost:
        return Trace(tuple(made.frames), made.first)  # the numbers in place did other harm
    return Trace(tuple(tamed.frames), tamed.first)


def _blaming_the_batch(frames: Sequence[Frame], batch: Any) -> Trace:
    bad = {name: kinds_of([t]) for name, t in tensors_in(batch, "batch") if not is_finite(t)}
    worst = min(bad, key=lambda name: bad[name] == {"-inf"})  # which may be a mask
    first = replace(frames[0], tensor=f"{worst} ({', '.join(sorted(bad[worst]))})")
    return Trace((first, *frames[1:]), first)


class _Run:
    """A batch that was run, and what was wrong first, whatever the batch was like."""

    def __init__(
        self, model: nn.Module, batch: Any, loss_of: Callable[[Any], Tensor], loss_scale: float
    ) -> None:
        self.modules: list[Frame] = []
        self.lost = False
        self._at: dict[int, int] = {}  # how many modules were through, by number of an event
        probe = Probe(model, batch, loss_of)
        self._origins = Origins(probe.named())
        self._kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        self._kinds["loss_of"] = getattr(loss_of, "__name__", type(loss_of).__name__)
        self._event: Event | None = None

        def judge(loss: Tensor) -> None:
            self.lost = not is_finite(loss)
            grads = [t.grad for _, t in probe.named() if t.is_leaf and t.grad is not None]
            self._wrong = self.lost or not all(map(is_finite, grads))
            results = [loss] if self.lost else grads
            self._event = self._origins.blamed(results, lost=self.lost)

        probe.run(self._visit, self._see, loss_scale=loss_scale, after=judge)
        self.frames, self.first = self._judged()

    def _see(self, operation: Operation) -> None:
        event = self._origins.see(operation)
        if event is not None:
            self._at[event.number] = len(self.modules)

    def _visit(
        self, phase: str, name: str, what: Any, into: list[Tensor], out: list[Tensor]
    ) -> None:
        frame = Frame(
            phase,
            name,
            getattr(what, "__name__", type(what).__name__),
            largest_in=largest_of(into),
            largest_out=largest_of(out),
            finite_in=all(map(is_finite, into)),
            finite_out=all(map(is_finite, out)),
        )
        self.modules.append(frame)

    def _judged(self) -> tuple[list[Frame], Frame | None]:
        """Returns the frames with the first that went wrong among them."""
        event, modules = self._event, self.modules
        if not self._wrong:
            return modules, None
        unseen = _unseen(modules, lost=self.lost)
        if event is None:
            return modules, unseen
        at = self._at[event.number]
        if "" in event.outside and unseen in modules[:at]:
            return modules, unseen  # what it got was computed where no operation was seen
        frame = _frame_of(event, self._kinds)
        if frame.phase == "batch":
            frame = replace(frame, finite_in=modules[0].finite_in, finite_out=modules[0].finite_out)
            return [frame, *modules[1:]], frame
        return [*modules[:at], frame, *modules[at:]], frame


def _unseen(frames: Sequence[Frame], *, lost: bool) -> Frame | None:
    """Returns the first module that made something that is not finite."""
    phases = ("forward", "loss", "backward") if lost else ("backward",)
    sources = (frame for frame in frames if frame.finite_in and not frame.finite_out)
    return next((frame for frame in sources if frame.phase in phases), None)


def _frame_of(event: Event, kinds: dict[str, str]) -> Frame:
    place = event.place
    tensor = event.cast_of or next(filter(None, event.outside), "")
    given = event.finite_in and event.cast_of.startswith("batch")
    return Frame(
        "batch" if given else place.phase,
        "batch" if given else place.module,
        kinds.get(place.module, ""),
        largest_in=event.largest_in,
        largest_out=event.largest_out,
        finite_in=event.finite_in,
        finite_out=False,
        operation=f"{event.name} of {place.node}" if place.node else event.name,
        line=str(place.line) if place.line is not None else "",
        tensor=tensor,
    )


def _changed(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns a copy whose floating tensors were changed."""

    def copied(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        return change(leaf.detach()).requires_grad_(leaf.requires_grad)

    return with_changed(batch, copied)


def _with_ones(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor, nan=1.0, posinf=1.0, neginf=-1.0)


def _with_large_numbers(tensor: Tensor) -> Tensor:
    bound = torch.finfo(tensor.dtype).max / 4  # to which a module can add something
    return torch.nan_to_num(tensor, nan=1.0, posinf=bound, neginf=-bound)
