"""Sums, half steps and strays: errors, and their remedies."""

from __future__ import annotations

import torch
from torch import nn

from mpcore_testing.stage_errors.parts import (
    EVERY,
    NO_SCALE,
    SCALERS,
    call,
    interrupted,
    passed,
    then,
    zero_grad,
)
from mpcore_testing.stage_errors.world import (
    OWN,
    Row,
    World,
    second_step,
)

SUMS = "stage_checks.py check_no_outside_scaler 1"
HALF = "writes.py Writes.check 1"
STRAY = "saving.py take_over_edits 1"


def added_outside(world: World) -> None:
    passed(world)
    world.optimizer.accumulate()
    world.backward(3)
    world.finish()


def own_sums(world: World) -> None:
    """An optimizer with a loss scale, as the message wants it."""
    world.__init__(world.engine, OWN)  # type: ignore[misc]
    world.step(1)
    for seed in (2, 3):
        world.backward(seed)
        world.optimizer.accumulate()
    world.optimizer.step()


def noted(world: World) -> None:
    world.notes.append(world.save())


def half_a_step(world: World) -> None:
    noted(world)
    passed(world)
    interrupted("cast_into", "update_")(World.finish)(world)


def go_back(world: World) -> None:
    world.load(world.notes[0])
    world.step(2)


def strayed(world: World) -> None:
    stray = nn.Parameter(torch.ones(3))
    world.notes.append(stray)
    world.optimizer.state[stray] = {"momentum_buffer": torch.ones(3)}
    world.optimizer.state_dict()


def into_a_group(world: World) -> None:
    world.optimizer.add_param_group({"params": [world.notes[0]]})
    assert world.optimizer.state_dict()["state"]
    world.step(2)


def out_of_the_state(world: World) -> None:
    del world.optimizer.state[world.notes[0]]
    assert world.optimizer.state_dict()["state"]
    world.step(2)


KEPT = [
    Row(
        "sums and a scaler: no accumulate",
        *(SUMS, SCALERS, added_outside),
        "Call zero_grad() of this optimizer; then leave out accumulate()",
        then(zero_grad, second_step),
        options={"scale": NO_SCALE},
    ),
    Row(
        "sums and a scaler: no scaler",
        *(SUMS, SCALERS, added_outside),
        "or the GradScaler: optimizer.backward(loss), accumulate() and step(), with a loss scale",
        *(own_sums, own_sums),
        options={"scale": NO_SCALE},
    ),
    *(
        Row(
            f"half a step, {name}: load",
            *(HALF, EVERY, then(half_a_step, call(name))),
            "Load a checkpoint: load_state_dict() of this optimizer, and of the model.",
            go_back,
        )
        for name in ("step", "state_dict", "unscale_", "__getstate__")
    ),
    Row(
        "a stray state: group",
        STRAY,
        (OWN,),
        strayed,
        "Put the parameter into a group",
        into_a_group,
    ),
    Row("a stray state: delete", STRAY, (OWN,), strayed, "or delete its entry", out_of_the_state),
]
