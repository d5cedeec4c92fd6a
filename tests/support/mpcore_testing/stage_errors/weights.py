"""Weights that do not fit: errors, and their remedies."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from mpcore_testing.stage_errors.parts import (
    EVERY,
    passed,
    then,
    zero_grad,
)
from mpcore_testing.stage_errors.world import (
    CLOSURE,
    MODEL,
    OWN,
    TWO,
    Do,
    Row,
    World,
    second_step,
)

UNFIT = "weight_edits.py WeightEdits._check_fit 1"
REFUSED = "weight_edits.py WeightEdits.hear 1"


@torch.no_grad()
def edited(world: World, value: float = 3.0) -> None:
    world.notes.append(world.low.weight.detach().clone())
    world.low.weight[0, 0] = value


@torch.no_grad()
def put_back(world: World) -> None:
    world.low.weight.copy_(world.notes[0])


def spoilt(world: World) -> None:
    edited(world, torch.nan)


def spoilt_behind(world: World) -> None:
    """Written once the gradients are there, so that they are finite."""
    passed(world)
    spoilt(world)
    world.finish()


def overflown(world: World) -> None:
    """A step that is skipped, as one through a weight that is not finite is."""
    world.zero()
    world.optimizer.backward(world.loss(2, torch.inf))
    world.optimizer.step()


def closed(world: World) -> None:
    """What the error has kept the loop from: the scaler's update, the second optimizer's step."""
    if world.scaler is not None:
        world.scaler.update()
    if world.setting == TWO:
        world.second()


def loaded_alone(world: World) -> None:
    """The optimizer's state without the model's."""
    world.notes.append(world.save())
    world.step(5)
    for optimizer, state in zip(world.optimizers, world.notes[0][1], strict=True):
        optimizer.load_state_dict(state)


def model_loaded(world: World) -> None:
    world.model.load_state_dict(world.notes[0][0])


def on_ranks(do: Do) -> Do:
    def as_of_several(world: World) -> None:
        with patch("mpcore.masters.weight_edits.several_ranks", return_value=True):
            do(world)

    return as_of_several


def synced(**options: Any) -> Do:
    return call_each("sync_masters_from_model", **options)


def call_each(name: str, **options: Any) -> Do:
    def do(world: World) -> None:
        for optimizer in world.optimizers:
            getattr(optimizer, name)(**options)

    return do


def begin_and_edit(world: World) -> None:
    """Masters exist before the first step: a look at gradients makes them."""
    passed(world)
    world.unscale()
    zero_grad(world)
    edited(world)


SYNC = "Call sync_masters_from_model() to go on from the weights"
LOAD = "or load the weights that go with the masters"

WEIGHTS = [
    *(
        Row(
            f"{name}: {remedy}",
            UNFIT,
            (*EVERY, CLOSURE),
            then(make, second_step),
            says,
            *how,
            options=options,
        )
        for name, make, back, options in [
            ("edited", edited, put_back, {"rule": "raise"}),
            ("loaded alone", loaded_alone, model_loaded, {}),
        ]
        for remedy, says, how in [
            ("sync", SYNC, (then(synced(), second_step), then(make, synced(), second_step))),
            ("weights", LOAD, (then(back, second_step),)),
        ]
    ),
    *(
        Row(
            f"edited before the first step of ranks: {remedy}",
            *(UNFIT, (OWN, MODEL), then(begin_and_edit, on_ranks(second_step)), says),
            *(follow, twin),
            begun=False,
        )
        for remedy, says, follow, twin in [
            (
                "sync",
                "Call sync_masters_from_model(exact=True) on every rank",
                then(synced(exact=True), on_ranks(second_step)),
                then(begin_and_edit, synced(exact=True), second_step),
            ),
            ("weights", LOAD, then(put_back, on_ranks(second_step)), second_step),
        ]
    ),
    Row(
        "not finite: write",
        *(REFUSED, (*EVERY, CLOSURE), then(spoilt, second_step), "Write finite ones"),
        then(put_back, second_step),
    ),
    Row(
        "not finite: take",
        *(REFUSED, (*EVERY, CLOSURE), then(spoilt, second_step)),
        "or call sync_masters_from_model() to take them",
        *(then(synced(), second_step), then(spoilt, synced(), second_step)),
    ),
    # found in the update: the step is over, and was skipped or has overwritten what was written
    Row(
        "not finite, always: write",
        *(REFUSED, (OWN, MODEL), then(spoilt, second_step), "Write finite ones"),
        *(then(put_back, second_step), then(overflown, second_step), {"rule": "always"}),
        fused_only=True,
    ),
    Row(
        "not finite, always: take",
        *(REFUSED, (OWN, MODEL), then(spoilt, second_step)),
        "or call sync_masters_from_model() to take them",
        *(then(synced(), second_step), then(overflown, spoilt, synced(), second_step)),
        {"rule": "always"},
        fused_only=True,
    ),
    Row(
        "not finite, always, overwritten: go on",
        *(REFUSED, (*EVERY,), spoilt_behind, "has overwritten them. Go on"),
        *(closed, second_step, {"rule": "always"}),
        fused_only=True,
    ),
    Row(
        "not finite, always, overwritten: take",
        *(REFUSED, (OWN, MODEL), spoilt_behind),
        "write them again and call sync_masters_from_model() to take them",
        *(then(spoilt, synced(), second_step), then(second_step, spoilt, synced(), second_step)),
        {"rule": "always"},
        fused_only=True,
    ),
]
