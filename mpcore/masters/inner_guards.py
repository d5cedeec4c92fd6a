"""What the wrapped optimizer leaves to its wrapper: `step`, checkpoints, the list of groups."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch

from mpcore.errors import StageError


class Stepper(Protocol):
    """What steps the wrapped optimizer."""

    stepping: bool  # whether it does now


class DirectStepGuard:
    """A step hook of the inner optimizer: raises unless the wrapper is the one who steps.

    Args:
        path: The path that may step. The guard does not keep it alive.
    """

    def __init__(self, path: Stepper) -> None:
        self._path = weakref.ref(path)

    @property
    def active(self) -> bool:
        """Whether the wrapper still exists."""
        return self._path() is not None

    def __call__(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        """Raises `StageError` if a user calls `step` on the wrapped optimizer."""
        path = self._path()
        if path is not None and not path.stepping:
            raise StageError(
                f"{type(optimizer).__name__}.step(): expected a step of the "
                "MixedPrecisionOptimizer around it, got a direct call. Scaled gradients would "
                "reach 16-bit weights; call step() of the wrapper."
            )


class CheckpointGuard:
    """A hook of the inner optimizer's `state_dict` or `load_state_dict`: names the wrapper's.

    The inner optimizer keeps its state under masters, which torch's methods cannot number, and a
    load would give it param groups that the wrapper does not share.

    Args:
        path: Of the wrapper. The guard does not keep it alive.
        method: The name of the method.
    """

    def __init__(self, path: Stepper, method: str) -> None:
        self._path = weakref.ref(path)
        self._method = method

    def __call__(self, optimizer: torch.optim.Optimizer, state_dict: object = None) -> None:
        """Raises `StageError` while the wrapper exists."""
        if self._path() is not None:
            raise StageError(
                f"{type(optimizer).__name__}.{self._method}(): expected a call of the "
                "MixedPrecisionOptimizer around it, got one of the wrapped optimizer. Call "
                f"{self._method}() of the wrapper; mpcore.migration converts states of "
                "torch.optim from and to its own."
            )


def check_shared_groups(
    shared: list[dict[str, Any]], wrappers: list[dict[str, Any]], inners: list[dict[str, Any]]
) -> None:
    """Raises `StageError` if the list of param groups was replaced on either optimizer.

    Args:
        shared: The list that both have had from the start.
        wrappers: That of the wrapper now.
        inners: That of the wrapped optimizer now.
    """
    if wrappers is shared and inners is shared:
        return
    where, remedy = "both", "Build both anew and load their state_dict"
    if wrappers is shared:
        where, remedy = (
            "optimizer.inner",
            "Write optimizer.inner.param_groups = optimizer.param_groups",
        )
    elif inners is shared:
        where, remedy = "optimizer", "Write optimizer.param_groups = optimizer.inner.param_groups"
    raise StageError(
        "param_groups: expected one list that the MixedPrecisionOptimizer and the optimizer in it "
        f"share, got another one on {where}. {remedy}, and change that list or its groups in place."
    )
