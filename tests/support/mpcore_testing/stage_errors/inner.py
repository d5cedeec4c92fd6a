"""The wrapped optimizer used past its wrapper: errors, and their remedies."""

from __future__ import annotations

import warnings

import mpcore
import mpcore.migration

from mpcore_testing.stage_errors.parts import (
    LOOPS,
    call,
    passed,
    then,
    zero_grad,
)
from mpcore_testing.stage_errors.world import (
    MODEL,
    OURS,
    OWN,
    TRAINER,
    Inner,
    Row,
    World,
    second_step,
)

DIRECT = "inner_guards.py DirectStepGuard.__call__ 1"
DOOR = "inner_guards.py CheckpointGuard.__call__ 1"
IGNORED = "general_path.py GeneralPath.step_with_closure 1"
METHOD = "inner_methods.py InnerMethods._call_inner 1"


def given_the_inner(world: World) -> None:
    """A scaler, or a trainer with one, that holds the wrapped optimizer."""
    passed(world)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "GradScaler unscales 16-bit gradients in place")
        world.scaler.step(world.optimizer.inner)


def saved_by_the_wrapper(world: World) -> None:
    world.load(world.save())
    world.step(2)


def saved_for_torch(world: World) -> None:
    plain = mpcore.migration.to_torch(world.optimizer)
    masters = [world.optimizer.state[p]["master"] for p in world.low.parameters()]
    masters += list(world.high.parameters())
    state = mpcore.migration.from_torch(world.optimizer, plain, masters=masters)
    state["mpcore"] = world.optimizer.state_dict()["mpcore"]
    world.optimizer.load_state_dict(state)
    world.step(2)


def ignoring(world: World) -> None:
    world.optimizer.inner.ignores = True
    world.optimizer.step(lambda: world.evaluate(2))


INNER = {"inner": Inner}
WRAPPED = [
    Row(
        "a step of the wrapped optimizer",
        *(DIRECT, LOOPS, then(passed, lambda world: world.optimizer.inner.step())),
        *("call step() of the wrapper", World.finish),
    ),
    Row(
        "a scaler with the wrapped optimizer",
        *(DIRECT, (OURS, TRAINER), given_the_inner, "call step() of the wrapper"),
    ),
    *(
        Row(
            f"the wrapped optimizer's state_dict: {name}",
            *(DOOR, (OWN,), lambda world: world.optimizer.inner.state_dict(), says, follow),
        )
        for name, says, follow in [
            ("wrapper", "Call state_dict() of the wrapper", saved_by_the_wrapper),
            ("migration", "mpcore.migration converts states of torch.optim", saved_for_torch),
        ]
    ),
    Row(
        "the wrapped optimizer's load_state_dict: wrapper",
        *(DOOR, (OWN,), lambda world: world.optimizer.inner.load_state_dict({})),
        *("Call load_state_dict() of the wrapper", saved_by_the_wrapper),
    ),
    Row(
        "a closure that is ignored",
        *(IGNORED, (OWN, MODEL), ignoring),
        "Run backward() first and call step() without a closure",
        options=INNER,
        general_only=True,
    ),
    *(
        Row(
            f"a method while gradients wait: {name}",
            *(METHOD, LOOPS, then(passed, call("train")), says, follow),
            options=INNER,
            general_only=True,
        )
        for name, says, follow in [
            ("step", "Call step() first", then(World.finish, call("train"))),
            (
                "zero_grad",
                "or zero_grad() of this optimizer",
                then(zero_grad, call("train"), second_step),
            ),
            (
                *("zero_grad, zeros", "or zero_grad() of this optimizer"),
                then(call("zero_grad", False), call("train"), second_step),
            ),
            ("the loop's", "zero_grad()", then(World.zero, call("train"), second_step)),
        ]
    ),
]
