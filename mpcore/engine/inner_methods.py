"""Methods of the wrapped optimizer that `torch.optim.Optimizer` does not have, such as `eval`."""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from mpcore.base import outside_graphs
from mpcore.engine.paths import Paths
from mpcore.engine.stage import Stage
from mpcore.engine.two_steps import FIRST, SECOND, TwoSteps
from mpcore.errors import StageError
from mpcore.masters import Masters, WeightEdits


class InnerMethods(TwoSteps):
    """Offers public methods of the wrapped optimizer; they see masters, and weights follow."""

    inner: torch.optim.Optimizer
    state: defaultdict[Tensor, Any]
    _began: bool
    _edits: WeightEdits
    _masters: Masters
    _paths: Paths
    _stage: Stage

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("inner")
        method = None if inner is None or name.startswith("_") else getattr(inner, name, None)
        if not inspect.ismethod(method):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in (FIRST, SECOND) and self._makes_two:
            part = self._first_step if name == FIRST else self._second_step
            return functools.partial(part, method)
        return functools.partial(self._call_inner, method)

    @outside_graphs
    def _call_inner(self, method: Any, *args: Any, **options: Any) -> Any:
        """Calls a method of the wrapped optimizer over masters; weights are rounded after it.

        Args:
            method: A bound method of `inner`.
            args: Passed on.
            options: Likewise.

        Raises:
            TypeError: The method does not take these arguments. Nothing has changed.
            StageError: Gradients of a scaled loss wait for a step: the method would not see them.
        """
        caller = f"{method.__name__}()"
        inspect.signature(method).bind(*args, **options)  # a TypeError of its own, before any write
        self._stage.check_whole(caller)
        self._check_between_steps(caller)
        if self._stage.waits:
            raise StageError(
                f"{caller} of {type(self.inner).__name__}: expected a call between two steps, got "
                "one while gradients of a scaled loss wait for step(). Call step() first, or "
                "zero_grad() of this optimizer."
            )
        self._masters.take_over_edits(self.state, self.param_groups)
        self._edits.check(caller)
        return self._paths.call_inner(
            lambda: self._edits.adopt(began=self._began),
            functools.partial(method, *args, **options),
        )
