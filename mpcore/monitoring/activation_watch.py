"""What modules return in the forward passes of a step that is read, module by module."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.backends import Inspection
from mpcore.base import FULL_PRECISION, PLAIN, SIXTEEN_BIT, why_no_memory
from mpcore.engine import Look, MixedPrecisionOptimizer
from mpcore.errors import ArgumentError
from mpcore.monitoring.findings import Columns, Finding
from mpcore.monitoring.nests import tensors_in
from mpcore.monitoring.pass_counts import added

_COUNTED = frozenset({*SIXTEEN_BIT, *FULL_PRECISION}) - {torch.float64}


@dataclass
class _Total:
    """What was found in all that a module has returned."""

    found: Inspection
    shape: torch.Size
    layout: tuple[torch.dtype, tuple[int, ...]]
    passes: int = 1

    def add(self, new: Inspection) -> None:
        """Adds what was found in another pass; no host sync."""
        self.found = added(self.found, new)
        self.passes += 1


class ActivationWatch:
    """Looks at what modules return while it is armed; nothing but `taken` syncs with the host.

    Passes of a module in eval mode are not looked at, nor are those that a backward pass runs again
    (activation checkpointing) and what is compiled. A module that hands on what one inside it has
    returned is left out.

    Args:
        model: Whose modules; None: there are none to look at.
        inspect: Counts the values of a tensor, as a backend does.
        kinds: Of devices that it reaches.

    Example:
        >>> from mpcore.backends import reference
        >>> model = nn.Linear(2, 2)
        >>> watch = ActivationWatch(model, partial(reference.inspect, statistics=True))
        >>> watch.arm(True)
        >>> _ = model(torch.ones(3, 2))
        >>> [(found.name, found.shape) for found in watch.taken()]
        [('Linear', (3, 2))]
    """

    def __init__(
        self,
        model: nn.Module | None,
        inspect: Callable[..., Inspection],
        kinds: Collection[str] = ("cpu",),
    ) -> None:
        self._model = model
        self._kinds = kinds
        self._inspect = inspect
        self._hooks: list[Any] = []
        self._totals: dict[tuple[str, torch.dtype], _Total] = {}
        self._last: Tensor | None = None  # what was returned last

    def arm(self, is_read: bool) -> None:
        """Begins to look, with a hook on each module, if the step to come is read."""
        if is_read and self._model is not None and not self._hooks:
            for name, module in self._model.named_modules():
                shown = name or type(module).__name__
                self._hooks.append(module.register_forward_hook(_Hook(partial(self._see, shown))))

    def forget(self) -> None:
        """Forgets passes that were thrown away."""
        self._totals, self._last = {}, None

    def end(self) -> None:
        """Takes the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.forget()

    def taken(self) -> tuple[Finding, ...]:
        """Ends the look and returns what was found, in the order of first returns; syncs."""
        totals = list(self._totals.items())
        self.end()
        return tuple(_finding(name, total) for (name, _), total in totals)

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, output: Any) -> None:
        if not module.training or torch._C._current_graph_task_id() != -1:
            return
        for place, tensor in tensors_in(output, name):
            if tensor is self._last or not self._can_count(tensor):
                continue
            self._last = tensor
            one = torch.ones((), device=tensor.device)
            found = self._inspect([tensor.detach()], one, None)
            key = (place, tensor.dtype)
            if key in self._totals:
                self._totals[key].add(found)
            else:
                layout = (tensor.dtype, tensor.stride())
                self._totals[key] = _Total(found, tensor.shape, layout)

    def _can_count(self, tensor: Tensor) -> bool:
        """Whether a tensor has values that the backend can reach, and counts."""
        return (
            type(tensor) in PLAIN
            and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            and why_no_memory(tensor) is None
            and tensor.dtype in _COUNTED
            and tensor.device.type in self._kinds
            and tensor.numel() > 0
        )


def watch_of(
    asked: bool, model: nn.Module | None, optimizer: MixedPrecisionOptimizer
) -> ActivationWatch:
    """Returns the watch of a monitor, over no module if nobody asked for one.

    Args:
        asked: Whether somebody did.
        model: Whose modules.
        optimizer: Whose backend counts.

    Raises:
        ArgumentError: There is no model.
    """
    if asked and model is None:
        raise ArgumentError(
            "activations: expected a model whose modules are to be watched, got none. Write "
            "Monitor(optimizer, model, activations=True)."
        )
    inspect = partial(optimizer._module.inspect, statistics=True)
    kinds = {param.device.type for param in optimizer._params()}
    return ActivationWatch(model if asked else None, inspect, kinds)


def _finding(name: str, total: _Total) -> Finding:
    look = Look((), [total.shape], (total.layout,), total.found)
    return replace(Columns([name], look, 1.0, sums=False).finding(0), passes=total.passes)


class _Hook:
    """A hook that copies and pickles of a model do without."""

    def __init__(self, see: Callable[[nn.Module, Any], None]) -> None:
        self._see = see

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._see(module, output)

    def __reduce__(self) -> Any:
        return _unwatched, ()


def _unwatched() -> Callable[..., None]:
    return _look_away


def _look_away(module: nn.Module, args: Any, output: Any) -> None:
    """What is left of a hook in a copy."""
