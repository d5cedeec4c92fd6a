"""What torch.compile must leave alone: methods that work by address and ask which tensor is which.

Dynamo would trace them to pieces: some hundred graphs for one step, minutes of compiling, warnings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from mpcore.base.labels import CHEAP_LABEL

_is_profiling: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
_GLOBAL_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)

_P = ParamSpec("_P")
_R = TypeVar("_R")


def outside_graphs(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Keeps a method and what it calls out of compiled graphs: one graph break where it is called.

    It does what `torch.compiler.disable` does, which would import Dynamo at once; this imports it
    with the first call. torch.optim uses the same for its own methods.
    """
    return _disable_dynamo(method)


def outside_graphs_step(step: Callable[_P, _R]) -> Callable[_P, _R]:
    """Does so for the `step` of an optimizer, hooks and profiling included.

    torch puts these around a `step` that has no mark yet when the first object is made. Its label
    for profilers costs some 20 us: while none runs, whoever else listens gets a cheaper one.
    """
    hooked = torch.optim.Optimizer.profile_hook_step(step)
    if CHEAP_LABEL is None:
        return _marked(outside_graphs(hooked))

    @wraps(step)
    def labelled(*args: _P.args, **options: _P.kwargs) -> _R:
        self: Any = args[0]
        hooks = (self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks, *_GLOBAL_HOOKS)
        if any(hooks) or _is_profiling():
            return hooked(*args, **options)
        with CHEAP_LABEL(f"Optimizer.step#{type(self).__name__}.step"):
            result = step(*args, **options)
            self._optimizer_step_code()
            return result

    return _marked(outside_graphs(labelled))


def _marked(step: Callable[_P, _R]) -> Callable[_P, _R]:
    step.hooked = True  # type: ignore[attr-defined]
    return step
