"""Notices `ddp.join()` without the optimizer, whose collectives nobody would answer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mpcore.base import are_same
from mpcore.errors import ArgumentError


class ModuleJoins:
    """Knows the DistributedDataParallel modules over some parameters, and looks what joins them."""

    def __init__(self) -> None:
        self._params: Sequence[Tensor] = ()
        self._modules: list[weakref.ref[Any]] = []
        self._seen: Any = None  # the last join that was looked at: torch never takes it back

    def check(self, params: Sequence[Tensor]) -> None:
        """Raises within a `Join` of a module over these parameters; the optimizer is in none.

        Args:
            params: Of the optimizer.

        Raises:
            ArgumentError: In the first step of each rank within it, before any is out of batches.
        """
        if not are_same(params, self._params):
            self._params, self._modules = list(params), _modules_over(params)
        for reference in self._modules:
            module = reference()
            config = getattr(module, "_join_config", None)
            if config is None or not config.enable or config is self._seen:
                continue
            self._seen = config
            if _is_joining(module):
                raise ArgumentError(
                    "step(): expected a Join over DistributedDataParallel and this optimizer, got "
                    "one over the module alone: a rank that has run out of batches would answer "
                    "its collectives and not the optimizer's, and all ranks would wait for ever. "
                    "Write `with torch.distributed.algorithms.join.Join([ddp, optimizer]):` in "
                    "place of `with ddp.join():`, or give all ranks as many batches."
                )


def _modules_over(params: Sequence[Tensor]) -> list[weakref.ref[Any]]:
    """Returns what synchronises some parameters.

    Nothing leads from these to it, so that all objects are gone through, once.
    """
    known = set(map(id, params))
    return [
        weakref.ref(each)
        for each in gc.get_objects()
        if type(each) is DistributedDataParallel
        and not known.isdisjoint(map(id, each.module.parameters()))
    ]


def _is_joining(module: Any) -> bool:
    """Whether a `Join` over a module has not ended."""
    return any(
        type(each).__name__ == "Join" and any(one is module for one in each._joinables)
        for each in gc.get_objects()
    )
