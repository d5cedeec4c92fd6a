"""What gradients were unscaled by, whenever somebody asks, wherever the scale has gone since."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from mpcore.engine.coefficient import Coefficient
from torch import nn

from mpcore_testing.engines import Engine


def backward(optimizer: Any, params: list[Any]) -> None:
    optimizer.backward(sum(param.float().sum() for param in params))


def plain(optimizer: Any, params: list[Any]) -> None:
    backward(optimizer, params)
    optimizer.step()


def clipped(optimizer: Any, params: list[Any]) -> None:
    backward(optimizer, params)
    optimizer.clip_grad_norm_(0.5)
    optimizer.clip_grad_norm_(0.25)
    optimizer.step()


def unscaled(optimizer: Any, params: list[Any]) -> None:
    backward(optimizer, params)
    optimizer.unscale_()
    optimizer.clip_grad_norm_(0.5)
    optimizer.step()


def accumulated(optimizer: Any, params: list[Any]) -> None:
    for _ in range(2):
        backward(optimizer, params)
        optimizer.accumulate()
    optimizer.step()


def in_closure(optimizer: Any, params: list[Any]) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(param.float().sum() for param in params)
        optimizer.backward(loss)
        return loss  # type: ignore[return-value]

    optimizer.step(closure)


WAYS = [plain, clipped, unscaled, accumulated, in_closure]
SCALES = [
    mpcore.DynamicLossScale(2.0**3, growth_interval=1, max_scale=2.0**9),
    mpcore.HeadroomLossScale(2.0**3),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scaling", SCALES, ids=["dynamic", "headroom"])
def test_a_step_tells_the_scale_it_used_after_that_has_moved(
    engine: Engine, way: Callable[[Any, Any], None], scaling: Any
) -> None:
    params = [nn.Parameter(torch.ones(3).to(d)) for d in (torch.float16, torch.float32)]
    optimizer = engine.wrap(torch.optim.SGD(params, lr=2.0**-9), scaling)
    moved = 0
    for _ in range(6):
        before = optimizer.loss_scale
        optimizer.zero_grad()
        way(optimizer, params)
        assert optimizer.last_step.loss_scale == before
        moved += optimizer.loss_scale != before
    assert moved > 0


@pytest.mark.parametrize("spends", [False, True])
def test_a_coefficient_is_settled_by_its_first_use(spends: bool) -> None:
    scale = torch.tensor(8.0)
    coefficient = Coefficient(scale, inverted=True)
    if spends:
        coefficient.spend()
    else:
        assert coefficient.now.item() == 0.125
    scale.fill_(2.0)
    assert coefficient.unscale.item() == 0.125
    assert coefficient.now.item() == (1.0 if spends else 0.125)
    assert coefficient.to_look_with(torch.device("cpu"))[1] is False


def test_a_look_settles_it_too_and_takes_the_scale_itself() -> None:
    scale = torch.tensor(8.0)
    coefficient = Coefficient(scale, inverted=True)
    given, inverted = coefficient.to_look_with(torch.device("cpu"))
    assert given is scale
    assert inverted
    found = mpcore.backends.reference.inspect([torch.ones(4)], given, 0.125, inverted=inverted)
    coefficient.note_look(found, inverted)
    assert coefficient.is_first
    coefficient.clip(found.coefficient)
    scale.fill_(2.0)
    assert coefficient.unscale.item() == 0.125
    assert coefficient.now.item() == pytest.approx(0.0625, rel=1e-5)
    assert not coefficient.is_first
