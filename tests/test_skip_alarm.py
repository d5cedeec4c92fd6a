"""The warning about steps that are all skipped: when it comes, and when not."""

from __future__ import annotations

import math
import warnings
from typing import Any

import mpcore
import pytest
import torch
from mpcore.skip_alarm import INTERVAL

from mpcore_testing.engines import Engine


def optimizer_of(engine: Engine, scale: Any) -> Any:
    weight = torch.nn.Parameter(torch.zeros(2).half())
    return weight, engine.wrap(torch.optim.SGD([weight], lr=0.1), scale)


def step(weight: Any, optimizer: Any, value: float) -> None:
    optimizer.scale(torch.ones(()))
    weight.grad = torch.full((2,), value).half()
    optimizer.step()


def test_a_hundred_skips_in_a_row_are_reported_once_in_a_hundred(engine: Engine) -> None:
    weight, optimizer = optimizer_of(engine, mpcore.DynamicLossScale())
    for _ in range(2):
        for _ in range(INTERVAL - 1):
            step(weight, optimizer, math.nan)
        with pytest.warns(UserWarning, match="each of the last 100 steps was skipped"):
            step(weight, optimizer, math.nan)


@pytest.mark.parametrize("start", [1, 57])
def test_a_search_for_the_scale_is_not(engine: Engine, start: int) -> None:
    scale = mpcore.DynamicLossScale(init=2.0**64, max_scale=2.0**64, growth_interval=1000)
    weight, optimizer = optimizer_of(engine, scale)
    for number in range(2 * INTERVAL):
        step(weight, optimizer, math.inf if start <= number < start + 64 else 1.0)


def test_a_grad_scaler_has_it_too() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), mpcore.GradScaler("cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(INTERVAL):
            optimizer.zero_grad()
            scaler.scale((weight * math.inf).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert ["each of the last 100 steps" in str(w.message) for w in caught] == [True]
