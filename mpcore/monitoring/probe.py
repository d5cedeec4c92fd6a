"""A batch, run through a model and back, with somebody looking at all that happens on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.monitoring.left_alone import LeftAlone
from mpcore.monitoring.nests import tensors_in, with_changed
from mpcore.monitoring.operations import Operation, OperationWatch, Whereabouts

#: Gets the phase ("batch", "forward", "loss" or "backward"), the name, the module or function, and
#: the floating tensors that went in and that came out: in the backward pass gradients.
Visit = Callable[[str, str, Any, list[Tensor], list[Tensor]], None]


class Probe:
    """One pass forward and one back, inner modules first; leaves model and batch as they were.

    Args:
        model: Any.
        batch: A tensor, a tuple of positional or a mapping of keyword arguments. The model gets
            copies of its tensors.
        loss_of: Returns the loss from the model's output. Without a graph nothing goes back.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> names = []
        >>> def visit(phase, name, what, into, out):
        ...     names.append(phase)
        >>> probe = Probe(model, torch.ones(1, 2), lambda out: out.sum())
        >>> probe.run(visit, lambda operation: names.append(operation.name))
        >>> names[:4]
        ['batch', 't', 'addmm', 'forward']
    """

    def __init__(self, model: nn.Module, batch: Any, loss_of: Callable[[Any], Tensor]) -> None:
        self._model = model
        self._loss_of = loss_of
        mapping = dict(batch) if isinstance(batch, Mapping) else batch
        #: What the model gets, written to or not.
        self.batch: Any = with_changed(mapping, _copied)

    def named(self) -> list[tuple[str, Tensor]]:
        """Returns batch, weights and buffers with their kind and name, as messages spell them."""
        given = tensors_in(self.batch, "batch")
        weights = [(f"weight {name}", param) for name, param in self._model.named_parameters()]
        buffers = [(f"buffer {name}", buffer) for name, buffer in self._model.named_buffers()]
        return [*given, *weights, *buffers]

    def run(
        self,
        visit: Visit,
        see: Callable[[Operation], object],
        *,
        loss_scale: float = 1.0,
        after: Callable[[Tensor], None] = lambda loss: None,
    ) -> None:
        """Runs forward and back.

        Put back are gradients, weights, buffers, attributes of modules, hooks and random number
        generators, also after an exception.

        Args:
            visit: Called for the batch, each module, and the loss.
            see: Called for each operation.
            loss_scale: What the loss is multiplied by in float32.
            after: Called with the loss at the end, while the gradients are there.
        """
        model, loss_of = self._model, self._loss_of
        where = Whereabouts(Probe.run.__code__)
        arriving = floating(self.batch)
        visit("batch", "batch", self.batch, arriving, arriving)
        with LeftAlone(model) as kept, contextlib.ExitStack() as stack:
            watch = OperationWatch(where, see, kept.save)

            def unseen(*what: Any) -> None:
                with watch.paused():
                    visit(*what)

            handles = stack.enter_context(_hooked(model, where, watch, unseen))
            stack.enter_context(watch)
            output = self._call()
            where.phase = "loss"
            where.modules.clear()
            loss = loss_of(output)
            with watch.paused():
                visit("loss", "loss_of", loss_of, floating(output), floating(loss))
                handles += _way_back("loss_of", loss_of, output, loss, where, unseen)
            where.phase = "backward"
            scaled = loss.float() * loss_scale
            if scaled.requires_grad:
                kept.expect(_leaves_of(scaled))
                scaled.backward()  # type: ignore[no-untyped-call]
            with watch.paused():
                after(loss.detach())

    def _call(self) -> Any:
        if isinstance(self.batch, Mapping):
            return self._model(**self.batch)
        given = self.batch if isinstance(self.batch, tuple) else (self.batch,)
        return self._model(*given)


def _leaves_of(result: Tensor) -> list[Tensor]:
    """Returns the tensors that a backward pass adds gradients to."""
    leaves: list[Tensor] = []
    seen: set[Any] = {None}
    waiting: list[Any] = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            waiting += [following for following, _ in node.next_functions]
    return leaves


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def floating(value: Any) -> list[Tensor]:
    """Returns the floating tensors in a value, detached."""
    return [tensor.detach() for _, tensor in tensors_in(value) if tensor.is_floating_point()]


@contextmanager
def _hooked(
    model: nn.Module, where: Whereabouts, watch: OperationWatch, visit: Visit
) -> Iterator[list[Any]]:
    handles: list[Any] = []

    def watched(name: str, module: nn.Module) -> list[Any]:
        entered: list[tuple[int, list[Tensor]]] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            depth = len(where.modules)
            where.modules.append(name)
            with watch.paused():  # copies: modules may write to what they are given
                inputs = [tensor.clone() for tensor in floating((args, kwargs))]
            entered.append((depth, inputs))

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            depth, inputs = entered.pop()
            del where.modules[depth:]  # also what a checkpoint has left early
            if where.phase == "backward":
                return  # a checkpoint runs it again
            with watch.paused():
                visit("forward", name, module, inputs, floating(output))
                handles.extend(_way_back(name, module, (args, kwargs), output, where, visit))

        return [
            module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    try:
        for name, module in model.named_modules():
            handles += watched(name, module)
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _way_back(
    name: str, what: Any, into: Any, output: Any, where: Whereabouts, visit: Visit
) -> list[Any]:
    """Has a visit made when gradients have come back through it; returns the hooks.

    Gradients that are taken in the forward pass, for a penalty for example, are none of it.
    """
    own = list(what.parameters()) if isinstance(what, nn.Module) else []
    sources = [t for t in (*_tensors(into), *own) if _has_hooks(t)]
    results = [t for t in _tensors(output) if _has_hooks(t)]
    if not sources or not results:
        return []
    arrived: list[Tensor] = []
    left: dict[int, Tensor] = {}
    nodes: list[Any] = [_node_of(tensor) for tensor in sources]
    expected: list[int] = []

    def arrive(grad: Tensor) -> None:
        if where.phase == "backward":
            arrived.append(grad)

    def leave(number: int, grad: Tensor) -> None:
        if where.phase != "backward":
            return
        if not expected:
            expected.append(sum(map(torch._C._will_engine_execute_node, nodes)))
        left[number] = grad
        if len(left) == expected[0]:
            visit("backward", name, what, list(arrived), [left[at] for at in sorted(left)])

    hooks: list[tuple[Tensor, Any]] = [(result, arrive) for result in results]
    hooks += [(source, partial(leave, number)) for number, source in enumerate(sources)]
    return [tensor.register_hook(hook) for tensor, hook in hooks]  # type: ignore[no-untyped-call]


def _node_of(tensor: Tensor) -> Any:
    """Returns what a gradient of a tensor goes through; of a leaf what adds it up."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn
    node: Any = tensor.view_as(tensor).grad_fn
    return node.next_functions[0][0]


def _has_hooks(tensor: Tensor) -> bool:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return tensor.requires_grad and not wrapped


def _tensors(value: Any) -> list[Tensor]:
    return [tensor for _, tensor in tensors_in(value)]
