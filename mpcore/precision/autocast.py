"""`torch.autocast` around a module's forward pass, by hooks that can be pickled and copied."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class _Entered(threading.local):
    """The autocast contexts that this thread has entered and not left; copies start empty."""

    def __init__(self) -> None:
        self.contexts: list[torch.autocast | None] = []

    def __reduce__(self) -> tuple[type[_Entered], tuple[()]]:
        return _Entered, ()


@dataclass(frozen=True)
class AutocastScope:
    """Runs the modules that it is attached to under `torch.autocast`, or out of its reach.

    Attributes:
        dtype: The type to compute in; `torch.float32` turns autocast off.
    """

    dtype: torch.dtype
    _entered: _Entered = field(default_factory=_Entered, repr=False, compare=False)

    def attach(self, module: nn.Module) -> None:
        """Registers the hooks, unless the module has the same ones already."""
        if scope_of(module) != self:
            module.register_forward_pre_hook(self.enter, prepend=True, with_kwargs=True)
            # also after an exception: an open autocast would reach into what runs next
            module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Enters autocast for the device of the module, or else of its inputs."""
        _untraced(self._enter)(_device_of(module, args, kwargs))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Leaves what `enter` entered last."""
        _untraced(self._leave)()

    def _enter(self, device: str | None) -> None:
        context = None
        if device is not None:
            enabled = self.dtype != torch.float32
            context = torch.autocast(device, self.dtype if enabled else None, enabled=enabled)
            context.__enter__()  # type: ignore[no-untyped-call]
        self._entered.contexts.append(context)

    def _leave(self) -> None:
        if not self._entered.contexts:  # another hook raised before `enter` ran
            return
        context = self._entered.contexts.pop()
        if context is not None:
            context.__exit__(None, None, None)


def _untraced(function: Callable[..., None]) -> Callable[..., None]:
    """Returns `function`, hidden from `torch.compile`.

    Traced, an autocast that one hook enters and another leaves would be mistaken. As a decorator,
    `torch.compiler.disable` would import the whole compiler.
    """
    if torch.compiler.is_compiling():
        disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return cast("Callable[..., None]", disabled)
    return function


def scope_of(module: nn.Module) -> AutocastScope | None:
    """Returns the scope that a module carries, if it carries one."""
    for hook in module._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, AutocastScope):
            return owner
    return None


def _device_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    parameter = next(module.parameters(), None)
    if parameter is not None:
        return parameter.device.type
    tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return next((tensor.device.type for tensor in tensors), None)
