"""What torch.compile must leave alone: methods that work by address and ask which tensor is which.

Dynamo would trace them to pieces: some hundred graphs for one step, minutes of compiling, warnings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo

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

    torch puts these around a `step` that has no mark yet when the first object is made.
    """
    hooked = outside_graphs(torch.optim.Optimizer.profile_hook_step(step))
    hooked.hooked = True  # type: ignore[attr-defined]
    return hooked
