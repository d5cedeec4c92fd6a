"""The warning about steps that are all skipped: when it comes, and when not."""

from __future__ import annotations

import copy
import math
import warnings
from types import SimpleNamespace
from typing import Any

import mpcore
import pytest
import torch
from mpcore.loss_scale import alarm as skip_alarm
from mpcore.loss_scale.alarm import INTERVAL, SkipAlarm
from mpcore.loss_scale.move import count_step_
from torch._subclasses.fake_tensor import FakeTensorMode

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
    for count in (100, 200):
        for _ in range(INTERVAL - 1):
            step(weight, optimizer, math.nan)
        assert optimizer.skips_in_a_row == count - 1
        with pytest.warns(UserWarning, match=f"each of the last {count} steps was skipped"):
            step(weight, optimizer, math.nan)
    step(weight, optimizer, 1.0)
    assert optimizer.skips_in_a_row == 0


@pytest.mark.parametrize("clean", range(0, INTERVAL, 9))
def test_ninety_nine_are_not_wherever_they_begin_and_two_hundred_are(clean: int) -> None:
    for skips, expected in ((INTERVAL - 1, 0), (2 * INTERVAL, 1)):
        alarm, counters = SkipAlarm(), torch.tensor([5000, 1000, 0, 3, 0, 0])  # of a run before
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for number in range(clean + skips + 300):
                count_step_(counters, torch.tensor(clean <= number < clean + skips))
                alarm.note(counters)
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
    for number, warning in enumerate(caught, start=1):
        assert f"each of the last {number}00 steps" in str(warning.message)
    assert len(caught) == 2
    assert scaler.skips_in_a_row == 200


class Device:
    """Stands in for CUDA: copies arrive, and steps are captured, when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fast, self.capturing, self.copies, self.in_a_row = True, False, 0, 0
        device = self

        class Copy:
            def __init__(self, tensor: torch.Tensor) -> None:
                device.copies += 1
                self.values = SimpleNamespace(tolist=[*[device.in_a_row] * 3, 0].copy)

            def has_arrived(self) -> bool:
                return device.fast

        monkeypatch.setattr(skip_alarm, "HostCopy", Copy)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def skip(self, alarm: SkipAlarm, steps: int) -> list[str]:
        """What the alarm says within some steps that are skipped."""
        with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            on_device = torch.empty(6, dtype=torch.int64, device="cuda")
            for _ in range(steps):
                self.in_a_row += 1
                alarm.note(on_device)
        return [str(warning.message) for warning in caught]


def test_counters_on_a_device_are_copied_and_looked_at_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, alarm = Device(monkeypatch), SkipAlarm()
    assert device.skip(alarm, 199) == []
    assert device.copies == 1
    (said,) = device.skip(alarm, 1)  # the copy of step 100 has arrived
    assert said.startswith("each of the last 100 steps was skipped")
    device.fast = False
    assert device.skip(alarm, 300) == []
    assert device.copies == 2  # one at a time
    device.fast = True
    (said,) = device.skip(alarm, 100)
    assert said.startswith("each of the last 200 steps was skipped")


def test_nothing_is_copied_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    for alarm in (SkipAlarm(), SkipAlarm("raise")):
        device = Device(monkeypatch)
        device.capturing = True
        assert device.skip(alarm, 300) == []
        assert device.copies == 0


def outcome(weight: Any, optimizer: Any) -> list[str]:
    """What a step that overflows says: the class and text of its error or warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            step(weight, optimizer, math.inf)
        except FloatingPointError as error:
            return [f"{type(error).__name__}: {error}"]
    return [f"{w.category.__name__}: {w.message}" for w in caught]


@pytest.mark.parametrize("at_min", ["clamp", "warn", "raise"])
def test_a_step_that_overflows_at_the_minimum_warns_or_raises_if_told_to(
    engine: Engine, at_min: str
) -> None:
    kind = {"warn": "UserWarning", "raise": "LossScaleError"}.get(at_min)
    scale = mpcore.DynamicLossScale(2.0, min_scale=1.0, at_min=at_min)
    weight, optimizer = optimizer_of(engine, scale)
    step(weight, optimizer, math.inf)  # reaches the minimum
    step(weight, optimizer, 1.0)
    for skipped in (2, 3):
        said = outcome(weight, optimizer)
        assert len(said) == (kind is not None)
        for text in said:
            assert text.startswith(f"{kind}: a step was skipped although the loss scale was at its")
            assert f"({skipped} of {skipped + 1} steps were skipped" in text
        # the step has ended: its result is there, and the next one needs a new loss
        assert optimizer.last_step.skipped
        assert optimizer.skipped_steps == skipped
        with pytest.raises(mpcore.StageError, match="got no scale"):
            optimizer.step()
        weight.grad = None
    step(weight, optimizer, 1.0)
    assert not optimizer.last_step.skipped


def test_what_overflowed_at_the_minimum_before_saving_is_no_news(engine: Engine) -> None:
    scale = mpcore.DynamicLossScale(1.0, min_scale=1.0, at_min="raise")
    weight, optimizer = optimizer_of(engine, scale)
    with pytest.raises(mpcore.LossScaleError):
        step(weight, optimizer, math.inf)
    other_weight, other = optimizer_of(engine, scale)
    other.load_state_dict(optimizer.state_dict())
    for one, of in ((other_weight, other), (weight, copy.deepcopy(optimizer))):
        of.param_groups[0]["params"][0].grad = None
        step(of.param_groups[0]["params"][0], of, 1.0)
        assert one is not None
        with pytest.raises(mpcore.LossScaleError):
            step(of.param_groups[0]["params"][0], of, math.inf)


def test_a_grad_scaler_raises_at_the_minimum_after_the_iteration() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = mpcore.GradScaler("cpu", init_scale=1.0, min_scale=1.0, at_min="raise")
    for number in (1, 2):
        optimizer.zero_grad()
        scaler.scale((weight * math.inf).sum()).backward()
        scaler.step(optimizer)
        with pytest.raises(mpcore.LossScaleError, match=f"{number} of {number} steps"):
            scaler.update()
        if number == 1:
            scaler = copy.deepcopy(scaler)
    again = mpcore.GradScaler("cpu")
    again.load_state_dict(scaler.state_dict())
    optimizer.zero_grad()
    again.scale(weight.sum()).backward()
    again.step(optimizer)
    again.update()
    assert again.state_dict()["_overflows_at_min"] == 2
