"""`trace_overflow`: runs a failing batch once more and names the first module that went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

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
            all is finite.
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
    frames: list[Frame] = [_batch_frame(batch)]
    with _left_alone(model), _watched(model, frames) as handles:
        output = _call(model, batch)
        loss = loss_of(output)
        frames.append(_frame("loss", "loss_of", loss_of, _floating(output), _floating(loss)))
        handles += _way_back("loss_of", loss_of, output, loss, frames)
        (loss.float() * loss_scale).backward()  # type: ignore[no-untyped-call]
    return Trace(tuple(frames), next(filter(_is_source, frames), None))


def _is_source(frame: Frame) -> bool:
    return not frame.finite_out and (frame.finite_in or frame.phase == "batch")


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _batch_frame(batch: Any) -> Frame:
    finite, largest = _look(_floating(batch))
    return Frame("batch", "batch", type(batch).__name__, largest, largest, finite, finite)


def _frame(phase: str, name: str, what: Any, into: list[Tensor], out: list[Tensor]) -> Frame:
    finite_in, largest_in = _look(into)
    finite_out, largest_out = _look(out)
    kind = getattr(what, "__name__", type(what).__name__)
    return Frame(phase, name, kind, largest_in, largest_out, finite_in, finite_out)


def _floating(value: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return [leaf.detach() for leaf in leaves if leaf.is_floating_point()]


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


@contextmanager
def _watched(model: nn.Module, frames: list[Frame]) -> Iterator[list[Any]]:
    """Adds a frame for every call of a module, inner ones first, and for its way back."""
    handles: list[Any] = []

    def watch(name: str, module: nn.Module) -> Any:
        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            into = (args, kwargs)
            frames.append(_frame("forward", name, module, _floating(into), _floating(output)))
            handles.extend(_way_back(name, module, into, output, frames))

        return module.register_forward_hook(after, with_kwargs=True)

    handles += [watch(name, module) for name, module in model.named_modules()]
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _way_back(name: str, what: Any, into: Any, output: Any, frames: list[Frame]) -> list[Any]:
    """Has a frame added when gradients have come back through it; returns the hooks."""
    own = what.parameters() if isinstance(what, nn.Module) else ()
    sources = [t for t in (*tree_leaves(into), *own) if _wants_gradient(t)]
    results = [t for t in tree_leaves(output) if _wants_gradient(t)]
    if not sources or not results:
        return []
    arrived: list[Tensor] = []

    def leave(grads: Any) -> None:
        left = [grad for grad in grads if grad is not None]
        frames.append(_frame("backward", name, what, list(arrived), left))

    return [
        *(result.register_hook(arrived.append) for result in results),
        torch.autograd.graph.register_multi_grad_hook(sources, leave),
    ]


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Puts gradients, buffers and random number generators back."""
    grads = [(param, param.grad) for param in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {param.device for param in model.parameters() if param.device.type == "cuda"}
    for param, _ in grads:
        param.grad = None
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
            yield
    finally:
        for param, grad in grads:
            param.grad = grad
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
