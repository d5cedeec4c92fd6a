"""FP32 buffers of 16-bit modules, lent to their forward passes as tensors that give way.

Outside of it they are plain tensors: to checkpoints, copies, wrappers and other devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpcore.base import FULL_PRECISION
from mpcore.precision.weak import RunningTensor, WeakTensor

Kind = type[WeakTensor]


class Lender:
    """The hooks of a module whose own buffers stay in FP32: weak ones while its `forward` runs.

    `torch.compile` traces no such tensors: there the buffers are plain, and torch's promotion
    holds.

    Args:
        kinds: By the buffer's name in the module, what it is seen as.
    """

    def __init__(self, kinds: dict[str, Kind]) -> None:
        self.kinds = kinds
        self._lent: list[dict[str, Tensor]] = []  # for each pass under way, what it has changed

    def before(self, module: nn.Module, args: Any) -> None:
        """Lends them, except those that are lent already: a buffer may have two owners."""
        if torch.compiler.is_compiling():
            return
        lent = {}
        for name, kind in self.kinds.items():
            buffer = module._buffers.get(name)
            if type(buffer) is Tensor and buffer.dtype in FULL_PRECISION:
                _see_as(buffer, kind)
                lent[name] = buffer
        self._lent.append(lent)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Takes them back, and what the pass has put in their places; also after an exception."""
        if torch.compiler.is_compiling() or not self._lent:
            return
        lent = self._lent.pop()
        for name, buffer in lent.items():
            _see_as(buffer, Tensor)
            now = module._buffers.get(name)
            if isinstance(now, WeakTensor):
                _see_as(now, Tensor)
        for name, now in module._buffers.items():
            if isinstance(now, WeakTensor) and name not in self.kinds:  # the pass has made it
                self.kinds[name] = type(now)
                _see_as(now, Tensor)


def _see_as(tensor: Tensor, kind: type[Tensor]) -> None:
    """Changes what a tensor is in place, so that it stays the same object to all who have it."""
    tensor.__class__ = kind


def lender_of(module: nn.Module) -> Lender | None:
    """Returns the lender of a module's own buffers, if it has one."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((each for each in owners if isinstance(each, Lender)), None)


def lend(module: nn.Module, kinds: dict[str, Kind]) -> None:
    """Makes a module see some of its own buffers as of `kinds`, beside those of before."""
    lender = lender_of(module)
    if lender is None:
        lender = Lender({})
        # first, since other hooks compute with buffers too: that of `spectral_norm`
        module.register_forward_pre_hook(lender.before, prepend=True)
        module.register_forward_hook(lender.after, always_call=True)
    lender.kinds |= kinds


def lend_running(module: nn.Module, name: str) -> None:
    """Makes a module see one of its own buffers as one that it writes."""
    lend(module, {name: RunningTensor})


def is_lent(module: nn.Module, name: str) -> bool:
    """Tells whether a module sees one of its own buffers as a tensor that gives way."""
    lender = lender_of(module)
    return lender is not None and name in lender.kinds
