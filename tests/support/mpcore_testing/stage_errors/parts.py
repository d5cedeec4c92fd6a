"""What rows are put together from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import mpcore
import pytest

from mpcore_testing.stage_errors.world import (
    MODEL,
    OURS,
    OWN,
    TORCH,
    TRAINER,
    TWO,
    Do,
    World,
)

NO_SCALE = mpcore.NoLossScale()
LOOPS = (OWN, MODEL, TWO)
SCALERS = (TORCH, OURS, TRAINER)
UNSCALING = (OWN, MODEL, TWO, OURS, TRAINER)  # torch's own refuses float16 gradients
EVERY = (OWN, MODEL, TWO, TORCH, OURS, TRAINER)


def then(*parts: Do) -> Do:
    """One after the other."""

    def do(world: World) -> None:
        for part in parts:
            part(world)

    return do


def zero_grad(world: World) -> None:
    """`zero_grad()` of the optimizer, whatever the loop has."""
    for optimizer in world.optimizers:
        optimizer.zero_grad()


def passed(world: World) -> None:
    """Cleared gradients and a backward pass."""
    world.zero()
    world.backward(2)


def unscaled(world: World) -> None:
    passed(world)
    world.unscale()


def clipped(world: World) -> None:
    passed(world)
    world.optimizer.clip_grad_norm_(0.5)


def call(name: str, *args: Any) -> Do:
    """A call of the optimizer."""
    return lambda world: getattr(world.optimizer, name)(*args)


def interrupted(*names: str) -> Callable[[Do], Do]:
    """What is left if calls of the backend fail while something is done."""

    def during(do: Do) -> Do:
        def provoke(world: World) -> None:
            with contextlib.ExitStack() as stack:
                for name in names:
                    broken = patch.object(world.optimizer._module, name, side_effect=MemoryError)
                    stack.enter_context(broken)
                stack.enter_context(pytest.raises(MemoryError))
                do(world)

        return provoke

    return during
