"""Who scales a loss: errors, and their remedies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mpcore_testing.stage_errors.parts import (
    LOOPS,
    NO_SCALE,
    SCALERS,
    call,
    clipped,
    passed,
    then,
    zero_grad,
)
from mpcore_testing.stage_errors.world import (
    CLOSURE,
    OURS,
    TRAINER,
    TWO,
    Do,
    Row,
    World,
    second_step,
)

NEVER = "stage_checks.py check_scaled 2"
TWICE = "stage_checks.py check_scaled 1"


def unscaled_pass(world: World) -> None:
    world.zero()
    world.loss(2).backward()


def unscaled_closure(world: World) -> None:
    def closure() -> Any:
        world.zero()
        loss = world.loss(2)
        loss.backward()
        return loss

    world.optimizer.step(closure)


def one_loss_of_two(world: World) -> None:
    """Each optimizer has a scale of its own; a loss can have one of them."""
    world.zero()
    world.optimizers[0].backward(world.loss(2))
    world.optimizers[1].step()


def scaled_outside(world: World) -> None:
    world.scale_outside()
    world.step(2)


def clip_then_finish(world: World) -> None:
    world.unscale()
    world.optimizer.clip_grad_norm_(0.5)
    world.finish()


def in_bfloat16(by: Callable[[World], None]) -> Do:
    def restart(world: World) -> None:
        world.__init__(  # type: ignore[misc]
            *(world.engine, world.setting), scale=NO_SCALE, dtype=torch.bfloat16
        )
        by(world)

    return restart


def without_scale(world: World) -> None:
    unscaled_pass(world)
    world.finish()


def scaled_twice(world: World) -> None:
    world.zero()
    world.scaler.scale(world.optimizer.scale(world.loss(2))).backward()


def own_scale(world: World) -> None:
    world.scaler = None
    world.step(2)


WRITE = "Clear the gradients and call optimizer.backward(loss) instead of loss.backward()."
LET = "make an mpcore.GradScaler the scaler: scaler.scale(loss).backward(), "
USE_ONE = "Use one of them, after zero_grad() of this optimizer: "

SCALING = [
    *(
        Row(f"never scaled, {name}: {remedy}", NEVER, LOOPS, then(unscaled_pass, call(*do)), *how)
        for name, do in {
            "step": ("step",),
            "unscale_": ("unscale_",),
            "clip": ("clip_grad_norm_", 0.5),
            "accumulate": ("accumulate",),
        }.items()
        for remedy, how in {
            "backward": (WRITE,),
            "GradScaler": (LET, scaled_outside, scaled_outside),
        }.items()
    ),
    Row("never scaled, closure: backward", NEVER, (CLOSURE,), unscaled_closure, WRITE),
    Row(
        "one loss of two optimizers: GradScaler",
        *(NEVER, (TWO,), one_loss_of_two, "or several optimizers step one loss, " + LET),
        *(scaled_outside, scaled_outside),
    ),
    Row(
        "scaled outside, clip: unscale_",
        *(NEVER, (OURS, TRAINER), clipped, "scaler.unscale_(optimizer) before a clip"),
        *(clip_then_finish, then(passed, clip_then_finish)),
    ),
    Row(
        "scaled outside, accumulate: step",
        *(NEVER, SCALERS, then(passed, call("accumulate"))),
        *("scaler.step(optimizer), scaler.update()", World.finish),
    ),
    Row(
        "never scaled: bfloat16",
        *(NEVER, LOOPS, then(unscaled_pass, call("step"))),
        "bfloat16 needs no scale: loss_scale=mpcore.NoLossScale()",
        *(in_bfloat16(without_scale), in_bfloat16(second_step)),
    ),
    *(
        Row(f"two scalers, {name}: {remedy}", TWICE, settings, then(scaled_twice, do), *how)
        for name, do, settings in [
            ("step", World.finish, SCALERS),
            ("unscale_", World.unscale, (OURS, TRAINER)),
        ]
        for remedy, how in {
            "the scaler": (
                *(USE_ONE + "scaler.scale(loss).backward() and scaler.step(optimizer)",),
                then(zero_grad, second_step),
            ),
            "our own": (
                *("optimizer.backward(loss) and optimizer.step()", then(zero_grad, own_scale)),
                own_scale,
            ),
        }.items()
    ),
]
