"""Calls out of turn: errors, and their remedies."""

from __future__ import annotations

import torch

from mpcore_testing.stage_errors.parts import (
    LOOPS,
    SCALERS,
    UNSCALING,
    call,
    clipped,
    interrupted,
    passed,
    then,
    unscaled,
    zero_grad,
)
from mpcore_testing.stage_errors.world import (
    MODEL,
    OURS,
    OWN,
    SCALE,
    TRAINER,
    TWO,
    Do,
    Row,
    World,
    second_step,
)

LATE = "stage_checks.py check_none_collected 1"
NEW = "stage_checks.py check_no_newcomer 1"
AGAIN = "stage_checks.py check_not_unscaled 1"
FIRST = "Run all backward passes first"
END = "or end that step, by step() or zero_grad() of its optimizer, clear all gradients, and run"


def another_pass(world: World) -> None:
    """As `scale(loss)` comes first, this fails before any gradient is written."""
    world.backward(3)


def running_pass(world: World) -> None:
    """Was scaled in time, and reaches gradients that are shown."""
    world.zero()
    scaler = world.optimizer if world.scaler is None else world.scaler
    second = scaler.scale(world.loss(3))
    world.backward(2)
    world.unscale()
    second.backward()


def pass_of_the_other(world: World) -> None:
    """Of the second optimizer, through gradients that the first shows."""
    unscaled(world)
    world.optimizers[1].backward(world.loss(99))


def another_loss(world: World) -> None:
    other = world.optimizer.add_loss("other", SCALE)
    clipped(world)
    other.backward(world.loss(3))


def both_passes(also: Do) -> Do:
    return then(passed, lambda world: world.backward(3), also, World.finish)


def newcomer(world: World) -> None:
    world.zero()
    world.optimizer.backward(world.high(torch.ones(2, 3)).sum())
    world.optimizer.clip_grad_norm_(0.5)
    world.low.weight.grad = torch.ones_like(world.low.weight)
    world.optimizer.step()


def twice_unscaled(world: World) -> None:
    unscaled(world)
    world.optimizer.unscale_()


OUT_OF_TURN = [
    *(
        Row(f"{late}: {remedy}", LATE, settings, provoke, *how)
        for late, settings, provoke, look in [
            ("a pass after clip", (OWN, MODEL), then(clipped, another_pass), clipped),
            ("a pass after unscale_", UNSCALING, then(unscaled, another_pass), unscaled),
            ("a running pass", UNSCALING, running_pass, unscaled),
            ("accumulate after clip", LOOPS, then(clipped, call("accumulate")), clipped),
            ("another loss after clip", (OWN, MODEL), another_loss, clipped),
        ]
        for remedy, how in {
            "passes first": (
                FIRST,
                both_passes(World.unscale),
                both_passes(World.unscale),
            ),
            "step": (END, World.finish, then(look, World.finish)),
            "zero_grad": (END, then(zero_grad, second_step)),
            "the loop's next step": (END, second_step),
        }.items()
    ),
    Row(
        "the other optimizer's pass: step",
        *(LATE, (TWO,), pass_of_the_other, END),
        *(World.finish, then(unscaled, World.finish)),
    ),
    Row("the other optimizer's pass: zero_grad", LATE, (TWO,), pass_of_the_other, END),
    *(
        Row(f"a new gradient: {name}", NEW, (OWN, MODEL, TWO), newcomer, says, follow)
        for name, says, follow in [
            ("zero_grad", "Call zero_grad() of this optimizer", zero_grad),
            ("the loop's next step", "run all backward passes first", lambda world: None),
        ]
        for follow in [then(follow, second_step)]
    ),
    Row(
        "unscale_ twice: step", AGAIN, UNSCALING, twice_unscaled, "Call step() first", World.finish
    ),
    Row(
        "unscale_ twice: zero_grad",
        *(AGAIN, UNSCALING, twice_unscaled, "or zero_grad() of this optimizer"),
        then(zero_grad, second_step),
    ),
    Row("unscale_ twice: the loop", AGAIN, UNSCALING, twice_unscaled, "step() first"),
    Row(
        "grads too early: unscale_",
        *("unscaling.py Unscaling.grads 1", LOOPS, then(passed, call("grads"))),
        *("Call unscale_() first", then(call("unscale_"), call("grads"), World.finish)),
    ),
    Row(
        "grads too early: unscale_ of the scaler",
        *("unscaling.py Unscaling.grads 1", (OURS, TRAINER), then(passed, call("grads"))),
        "where an mpcore.GradScaler scales, scaler.unscale_(optimizer)",
        then(World.unscale, call("grads"), World.finish),
    ),
    *(
        Row(
            f"half unscaled{where}: {remedy}",
            *("stage_checks.py raise_torn 1", settings),
            then(passed, interrupted("unscale_")(look), World.finish),
            *("Call zero_grad() of this optimizer and run the backward passes again", follow),
            general_only=look is World.finish,
        )
        for where, settings, look in [
            (" by unscale_", (OWN, MODEL, OURS, TRAINER), World.unscale),
            (" by step", (OWN, MODEL, *SCALERS), World.finish),
        ]
        for remedy, follow in [("zero_grad", then(zero_grad, second_step))]
    ),
]
