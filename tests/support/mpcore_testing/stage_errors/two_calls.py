"""Steps of two calls, and lists of param groups that were replaced: errors, and their remedies."""

from __future__ import annotations

import copy
from typing import Any

import torch

from mpcore_testing.stage_errors.parts import call, passed, then, zero_grad
from mpcore_testing.stage_errors.world import MODEL, OWN, Do, Row, World

BETWEEN = "two_steps.py TwoSteps._check_between_steps 1"
NO_FIRST = "two_steps.py TwoSteps._second_step 1"
GROUPS = "inner_guards.py check_shared_groups 1"


class Climbing(torch.optim.SGD):
    """A sharpness-aware optimizer, cut short; its `step` is plain SGD's."""

    @torch.no_grad()
    def first_step(self) -> None:
        for param in self._all():
            self.state[param]["old"] = param.clone()
            param.add_(param.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for param in self._all():
            param.copy_(self.state[param].pop("old")).sub_(param.grad, alpha=0.1)

    def _all(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


def climbed(world: World) -> None:
    passed(world)
    world.optimizer.first_step()


def come_back(world: World) -> None:
    world.zero()
    world.backward(5)
    world.optimizer.second_step()


def replaced(*names: str) -> Do:
    def provoke(world: World) -> None:
        world.notes.append(world.save())
        passed(world)
        other = copy.deepcopy(world.optimizer.param_groups)
        for name in names:
            owner = world.optimizer.inner if name == "inner" else world.optimizer
            owner.param_groups = other
        world.finish()

    return provoke


def write_the_inner(world: World) -> None:
    world.optimizer.inner.param_groups = world.optimizer.param_groups
    world.finish()


def write_the_wrapper(world: World) -> None:
    world.optimizer.param_groups = world.optimizer.inner.param_groups
    world.finish()


def build_anew(world: World) -> None:
    saved = world.notes[0]
    world.__init__(world.engine, world.setting)  # type: ignore[misc]
    world.load(saved)
    world.step(2)


TWO_CALLS = [
    *(
        Row(
            f"between two calls, {name}",
            *(BETWEEN, (OWN, MODEL), then(climbed, call(name))),
            "Run the second backward pass and call second_step() first.",
            come_back,
            then(climbed, come_back),
            options={"inner": Climbing},
            general_only=True,
        )
        for name in ("step", "state_dict", "__getstate__")
    ),
    Row(
        "the second call without the first",
        *(NO_FIRST, (OWN, MODEL), then(passed, call("second_step"))),
        "Call zero_grad(), and first_step() after a backward pass.",
        then(zero_grad, climbed, come_back),
        then(climbed, come_back),
        options={"inner": Climbing},
        general_only=True,
    ),
    *(
        Row(
            f"other groups, {' and '.join(names)}", GROUPS, (OWN, MODEL), replaced(*names), says, do
        )
        for names, says, do in [
            (
                ("inner",),
                "Write optimizer.inner.param_groups = optimizer.param_groups",
                write_the_inner,
            ),
            (
                ("wrapper",),
                "Write optimizer.param_groups = optimizer.inner.param_groups",
                write_the_wrapper,
            ),
            (("inner", "wrapper"), "Build both anew and load their state_dict", build_anew),
        ]
    ),
]
