"""A batch, run through a model and back, with somebody looking at every module on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

#: Gets the phase ("batch", "forward", "loss" or "backward"), the name, the module or function, and
#: the floating tensors that went in and that came out: in the backward pass gradients.
Visit = Callable[[str, str, Any, list[Tensor], list[Tensor]], None]


def run_and_visit(
    model: nn.Module,
    batch: Any,
    loss_of: Callable[[Any], Tensor],
    visit: Visit,
    *,
    loss_scale: float = 1.0,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Runs forward and back, inner modules first; leaves the model as it was.

    Put back are gradients, buffers, hooks and random number generators.

    Args:
        model: Any.
        batch: A tensor, a tuple of positional or a dictionary of keyword arguments.
        loss_of: Returns the loss from the model's output.
        visit: Called for the batch, each module, and the loss.
        loss_scale: What the loss is multiplied by in float32.
        after: Called at the end, while the gradients are there.
    """
    batch = dict(batch) if isinstance(batch, Mapping) else batch  # whose tensors PyTorch would miss
    arriving = _floating(batch)
    visit("batch", "batch", batch, arriving, arriving)
    with _left_alone(model), _hooked(model, visit) as handles:
        output = _call(model, batch)
        loss = loss_of(output)
        visit("loss", "loss_of", loss_of, _floating(output), _floating(loss))
        handles += _way_back("loss_of", loss_of, output, loss, visit)
        (loss.float() * loss_scale).backward()  # type: ignore[no-untyped-call]
        after()


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _floating(value: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return [leaf.detach() for leaf in leaves if leaf.is_floating_point()]


@contextmanager
def _hooked(model: nn.Module, visit: Visit) -> Iterator[list[Any]]:
    handles: list[Any] = []

    def watch(name: str, module: nn.Module) -> list[Any]:
        inputs: list[list[Tensor]] = []  # copies: modules may write to what they are given

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            inputs.append([tensor.clone() for tensor in _floating((args, kwargs))])

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            visit("forward", name, module, inputs.pop(), _floating(output))
            handles.extend(_way_back(name, module, (args, kwargs), output, visit))

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    for name, module in model.named_modules():
        handles += watch(name, module)
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _way_back(name: str, what: Any, into: Any, output: Any, visit: Visit) -> list[Any]:
    """Has a visit made when gradients have come back through it; returns the hooks."""
    own = what.parameters() if isinstance(what, nn.Module) else ()
    sources = [t for t in (*tree_leaves(into), *own) if _wants_gradient(t)]
    results = [t for t in tree_leaves(output) if _wants_gradient(t)]
    if not sources or not results:
        return []
    arrived: list[Tensor] = []

    def leave(grads: Any) -> None:
        visit("backward", name, what, list(arrived), [grad for grad in grads if grad is not None])

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
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
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
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer  # which a forward pass may have replaced
                buffer.copy_(value)
