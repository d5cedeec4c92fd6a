"""A step that failed before it wrote anything: the next pass is not mixed with what it had seen.

Whoever clears gradients by `model.zero_grad()` tells the optimizer nothing of it, nor does a pass
that an outside scaler scales.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import mpcore
import pytest
import torch

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import ENGINES, Engine
from mpcore_testing.stage_errors.parts import EVERY, interrupted
from mpcore_testing.stage_errors.world import MODEL, OURS, OWN, TORCH, TRAINER, World


class Raw(World):
    """No loss scale, and a loop that knows of none."""

    def __init__(self, engine: Engine, setting: str) -> None:
        super().__init__(engine, setting, scale=mpcore.NoLossScale())

    def backward(self, seed: int) -> None:
        self.loss(seed).backward()


def before_a_look(world: World) -> None:
    interrupted("inspect", "unscale_into")(World.finish)(world)


def by_a_hook(world: World) -> None:
    """After gradients were unscaled, those in float32 in place."""

    def fail(*_: Any) -> None:
        raise RuntimeError("a hook")

    hook = world.optimizer.inner.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a hook"):
        world.finish()
    hook.remove()


FAILURES = {
    f"{engine}, {fail.__name__}": (engine, fail)
    for engine in ENGINES
    for fail in (before_a_look, by_a_hook)
    if fail is before_a_look or not engine.fused
}
CASES = [
    pytest.param(
        kind, setting, engine, fail, id=f"{kind.__name__}, {setting}, {engine}, {fail.__name__}"
    )
    for kind, settings in [(World, EVERY), (Raw, (OWN, MODEL))]
    for setting in settings
    for engine in ENGINES
    for name, fail in [("look", before_a_look), ("hook", by_a_hook)]
    if name == "look" or not engine.fused
]


@pytest.mark.parametrize("clears", ["None", "zeros"])
@pytest.mark.parametrize(("kind", "setting", "engine", "fail"), CASES)
def test_the_next_pass_is_what_is_stepped_with(
    kind: Any, setting: str, engine: Engine, fail: Any, clears: str
) -> None:
    world, twin = kind(engine, setting), kind(engine, setting)
    for one in (world, twin):
        one.step(1)
    world.zero()
    world.backward(7)
    fail(world)
    for one in (world, twin):
        one.zero()
        if clears == "zeros":
            for param in one.model.parameters():
                param.grad = torch.zeros_like(param)
        one.backward(2)
        one.finish()
        one.step(3)
    assert same_bits(world.contents(), twin.contents())


@pytest.mark.parametrize("setting", [OWN, MODEL, TORCH, OURS, TRAINER])
@pytest.mark.parametrize(("engine", "fail"), FAILURES.values(), ids=FAILURES)
def test_a_step_that_failed_may_be_taken_again(engine: Engine, setting: str, fail: Any) -> None:
    world, twin = World(engine, setting), World(engine, setting)
    for one in (world, twin):
        one.step(1)
        one.zero()
        one.backward(2)
    fail(world)
    for one in (world, twin):
        one.finish()
        one.step(3)
    assert same_bits(world.contents(), twin.contents())


@pytest.mark.parametrize("setting", [OURS, TRAINER])
def test_a_scaler_unscales_anew_what_follows_gradients_that_were_thrown_away(
    engine: Engine, setting: str
) -> None:
    """A loop that clears gradients after `unscale_` and goes on without `update`."""
    world, twin = World(engine, setting), World(engine, setting)
    world.zero()
    world.backward(7)
    world.unscale()
    for one in (world, twin):
        one.zero()
        one.backward(2)
        if setting == OURS:
            one.unscale()
        one.finish()
    assert same_bits(world.contents(), twin.contents())


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_retry_by_unscale_keeps_what_is_edited_then(engine: Engine) -> None:
    def train(fails: bool) -> Any:
        param = torch.nn.Parameter(torch.linspace(-2, 2, 8).half())
        optimizer = engine.wrap(torch.optim.AdamW([param], lr=0.1), mpcore.StaticLossScale(8.0))
        optimizer.backward((param * torch.arange(8)).sum())
        if fails:
            with (
                patch.object(optimizer._module, "inspect", side_effect=MemoryError),
                patch.object(optimizer._module, "unscale_into", side_effect=MemoryError),
                pytest.raises(MemoryError),
            ):
                optimizer.step()
        optimizer.unscale_()
        param.grad.mul_(torch.arange(8) % 3)
        norm = optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        return norm, dict(optimizer.state[param])

    assert same_bits(train(True), train(False))
