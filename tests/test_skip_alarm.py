"""The warning about steps that are all skipped: when it comes, and when not."""

from __future__ import annotations

import math
import warnings
from typing import Any

import mpcore
import pytest
import torch
from mpcore.skip_alarm import INTERVAL, SkipAlarm

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
    for _ in range(INTERVAL):
        step(weight, optimizer, math.nan)
    for _ in range(2):
        for _ in range(INTERVAL - 1):
            step(weight, optimizer, math.nan)
        with pytest.warns(UserWarning, match="each of the last 100 steps was skipped"):
            step(weight, optimizer, math.nan)


@pytest.mark.parametrize("clean", range(0, INTERVAL, 9))
def test_ninety_nine_are_not_wherever_they_begin_and_two_hundred_are(clean: int) -> None:
    for skips, expected in ((INTERVAL - 1, 0), (2 * INTERVAL, 1)):
        alarm, skipped = SkipAlarm(), torch.tensor(1000)  # of a run before
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for number in range(clean + skips + 300):
                skipped += int(clean <= number < clean + skips)
                alarm.note(skipped, torch.tensor(number))
        assert len(caught) >= expected
        assert expected or not caught


def test_what_was_skipped_before_a_checkpoint_was_loaded_does_not_count(engine: Engine) -> None:
    weight, optimizer = optimizer_of(engine, mpcore.DynamicLossScale())
    step(weight, optimizer, 1.0)
    saved = optimizer.state_dict()
    saved["mpcore"]["loss_scale"] |= {"steps": 50_000, "skipped_steps": 150}
    optimizer.load_state_dict(saved)
    for _ in range(2 * INTERVAL):
        step(weight, optimizer, 1.0)
    assert optimizer.skipped_steps == 150
    param = torch.nn.Parameter(torch.zeros(2))
    sgd, scaler = torch.optim.SGD([param], lr=0.1), mpcore.GradScaler("cpu")
    for number in range(2 * INTERVAL):
        if number == 1:
            scaler.load_state_dict(scaler.state_dict() | {"_steps": 50_000, "_skipped_steps": 150})
        sgd.zero_grad()
        scaler.scale(param.sum()).backward()
        scaler.step(sgd)
        scaler.update()
    assert scaler.skipped_steps == 150


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
        for _ in range(2 * INTERVAL):
            optimizer.zero_grad()
            scaler.scale((weight * math.inf).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert ["each of the last 100 steps" in str(w.message) for w in caught] == [True]
