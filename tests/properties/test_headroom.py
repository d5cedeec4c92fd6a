"""The scale that is computed from the largest gradient: rule, bounds, engines, use."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import mpcore
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore import HeadroomLossScale
from mpcore.errors import ArgumentError, ArgumentTypeError
from mpcore.loss_scale import LossScaleState, initial_state, next_state
from mpcore.loss_scale.tensors import LossScaleTensors
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import ENGINES, FUSED, Engine

CPU = torch.device("cpu")
# None overflows; another step has a largest gradient
PEAKS = st.none() | st.just(0.0) | st.floats(2.0**-40, 2.0**20)
HISTORIES = st.lists(PEAKS, max_size=30)


@st.composite
def scales(draw: st.DrawFn) -> HeadroomLossScale:
    low, init, high = sorted(draw(st.tuples(*[st.integers(-40, 60)] * 3)))
    return HeadroomLossScale(
        2.0**init,
        spare_bits=draw(st.integers(1, 15)),
        window=draw(st.integers(2, 9)),
        backoff_factor=2.0 ** -draw(st.integers(1, 5)),
        min_scale=2.0**low,
        max_scale=2.0**high,
    )


def course(scale: HeadroomLossScale, history: list[float | None]) -> list[LossScaleState]:
    states = [initial_state(scale)]
    for peak in history:
        states.append(next_state(scale, states[-1], found_inf=peak is None, largest=peak or 0.0))
    return states[1:]


def on_tensors(scale: HeadroomLossScale, history: list[float | None]) -> list[LossScaleState]:
    tensors, seen = LossScaleTensors.from_state(initial_state(scale), CPU), []
    for peak in history:
        largest = torch.tensor(math.nan if peak is None else peak, dtype=torch.float64)
        scale.advance_(tensors, torch.tensor(int(peak is None)), largest=largest)
        seen.append(tensors.to_state())
    return seen


def by_hand(scale: HeadroomLossScale, history: list[float | None]) -> list[float]:
    """An oracle that keeps every peak, with the half of the window that it was seen in."""
    now, clean, peaks, seen = scale.init, 0, [], []
    half = math.ceil(scale.window / 2)
    for peak in history:
        number = clean // half
        if peak is None:
            now = max(now * scale.backoff_factor, scale.min_scale)
            # the largest power of two that the lower scale leaves room for
            peaks.append((number, 2.0**15 / 2.0**scale.spare_bits / now))
        else:
            peaks.append((number, peak))
            top = max(p for n, p in peaks if n >= number - 1)
            if top > 0:
                ceiling = 2.0**16 / 2.0**scale.spare_bits
                power = -100
                while top * 2.0 ** (power + 1) < ceiling:
                    power += 1
                now = min(max(2.0**power, scale.min_scale), scale.max_scale)
            clean += 1
        seen.append(now)
    return seen


@given(scale=scales(), history=HISTORIES)
def test_the_tensors_follow_the_specification(
    scale: HeadroomLossScale, history: list[float | None]
) -> None:
    assert on_tensors(scale, history) == course(scale, history)


@given(scale=scales(), history=HISTORIES)
def test_the_specification_equals_an_oracle_that_remembers_everything(
    scale: HeadroomLossScale, history: list[float | None]
) -> None:
    assert [state.scale for state in course(scale, history)] == by_hand(scale, history)


@given(scale=scales(), history=HISTORIES)
def test_scales_stay_powers_of_two_within_bounds_and_leave_room(
    scale: HeadroomLossScale, history: list[float | None]
) -> None:
    for state, peak in zip(course(scale, history), history, strict=True):
        assert math.frexp(state.scale)[0] == 0.5
        assert scale.min_scale <= state.scale <= scale.max_scale
        if peak is not None and state.scale > scale.min_scale:
            assert peak * state.scale < 2.0 ** (16 - scale.spare_bits)


def test_a_thousand_overflows_and_a_thousand_vanishing_gradients_stay_within_bounds() -> None:
    scale = HeadroomLossScale(min_scale=2.0**-126, max_scale=2.0**126)
    assert on_tensors(scale, [None] * 1000)[-1].scale == 2.0**-126
    assert on_tensors(scale, [2.0**-149] * 1000)[-1].scale == 2.0**126


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": 3.0}, "init: expected a power of two"),
        ({"init": 0.5}, r"init: expected a scale within \[min_scale, max_scale\]"),
        ({"spare_bits": 16}, "spare_bits: expected 1 to 15, got 16"),
        ({"spare_bits": 0}, "spare_bits: expected an integer from 1"),
        ({"window": 1}, "window: expected at least 2 steps"),
        ({"backoff_factor": 1.0}, "backoff_factor: expected a power of two below 1"),
    ],
)
def test_impossible_numbers_are_named(options: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        HeadroomLossScale(**options)
    with pytest.raises(ArgumentTypeError):
        HeadroomLossScale(**dict.fromkeys(options, "x"))


def step(optimizer: Any, params: list[nn.Parameter], largest: float, way: str) -> None:
    """A step whose unscaled gradients are at most `largest`."""
    optimizer.zero_grad()
    optimizer.scale(torch.ones(()))
    for param in params:
        param.grad = torch.full_like(param, largest / 2 * optimizer.loss_scale)
    params[0].grad[0] = -largest * optimizer.loss_scale
    if way == "clip":
        optimizer.clip_grad_norm_(1e-3)
    if way == "unscale":
        optimizer.unscale_()
    optimizer.step()


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("way", ["step", "clip", "unscale"])
@pytest.mark.parametrize("others", [[], [torch.float32, torch.bfloat16]])
def test_every_engine_follows_the_specification(
    engine: Engine, way: str, others: list[torch.dtype]
) -> None:
    dtypes = [torch.float16, torch.float16, *others]
    params = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes]
    params.append(nn.Parameter(torch.zeros(0).half()))  # nothing has no largest value
    scale = HeadroomLossScale(2.0**8, spare_bits=3, window=4)
    optimizer = engine.wrap(torch.optim.SGD(params, lr=0.1), scale)
    history = [2.0**-3, 2.0**-9, None, 2.0**-12, 2.0**-12, 2.0**-12, 2.0**-12, 2.0**-12]
    for peak, state in zip(history, course(scale, history), strict=True):
        step(optimizer, params, math.inf if peak is None else peak, way)
        assert optimizer.loss_scale == state.scale
        assert optimizer.last_step.skipped == (peak is None)
    # the peak of the first steps is forgotten
    assert optimizer.loss_scale == 2.0**24


@pytest.mark.parametrize("engine", FUSED, ids=str)
def test_without_float16_gradients_the_scale_stays(engine: Engine) -> None:
    params = [nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float32, torch.bfloat16)]
    optimizer = engine.wrap(torch.optim.SGD(params, lr=0.1), HeadroomLossScale())
    step(optimizer, params, 2.0**-20, "step")
    assert optimizer.loss_scale == 2.0**16


def test_the_state_is_saved_and_goes_on(engine: Engine) -> None:
    scale = HeadroomLossScale(2.0**8, window=6)
    params = [nn.Parameter(torch.zeros(3).half())]
    optimizer = engine.wrap(torch.optim.SGD(params, lr=0.1), scale)
    for peak in (2.0**-3, 2.0**-9):
        step(optimizer, params, peak, "step")
    saved = optimizer.state_dict()
    assert saved["mpcore"]["loss_scale"]["peak"] == 2.0**-3
    fresh = engine.wrap(torch.optim.SGD(params, lr=0.1), scale)
    fresh.load_state_dict(saved)
    assert same_bits(fresh.state_dict(), saved)
    narrower = dataclasses.replace(scale, max_scale=2.0**9)
    bounded = engine.wrap(torch.optim.SGD(params, lr=0.1), narrower)
    bounded.load_state_dict(saved)
    assert bounded.loss_scale == 2.0**9
    for bad in (-1.0, math.nan, math.inf, 1, "x"):
        section = {**saved["mpcore"], "loss_scale": {**saved["mpcore"]["loss_scale"], "peak": bad}}
        with pytest.raises(ArgumentError, match="'peak'"):
            fresh.load_state_dict({**saved, "mpcore": section})
    assert same_bits(fresh.state_dict(), saved)


def lost(scale: Any, spikes: bool) -> tuple[float, int]:
    """Shares of gradients flushed to 0 by float16, and steps skipped, over a run that converges."""
    generator = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.zeros(1000).half())
    optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD([weight], lr=0.0), scale)
    flushed = 0
    for number in range(400):
        spread = 2.0 ** (-20 - number / 25)  # gradients shrink as training converges
        true = torch.randn(1000, generator=generator) * spread
        if spikes and number % 97 == 96:
            true *= 256
        optimizer.scale(torch.ones(()))
        weight.grad = (true * optimizer.loss_scale).half()
        flushed += int((weight.grad == 0).sum())
        optimizer.step()
        optimizer.zero_grad()
    return flushed / 400_000, optimizer.skipped_steps


@pytest.mark.parametrize("spikes", [False, True])
def test_fewer_gradients_are_lost_than_by_the_classic_schedule_and_hardly_a_step(
    spikes: bool,
) -> None:
    classic, _ = lost(mpcore.DynamicLossScale(), spikes)
    headroom, skipped = lost(HeadroomLossScale(), spikes)
    assert classic > 10 * headroom
    assert skipped <= (4 if spikes else 0)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_hook_that_drops_the_gradients_takes_nothing_from_the_scale(engine: Engine) -> None:
    scale, expected = HeadroomLossScale(2.0**8), []
    for drops in (False, True):
        param = nn.Parameter(torch.zeros(3).half())
        inner = torch.optim.SGD([param], lr=0.1)
        optimizer = engine.wrap(inner, scale)
        if drops and not engine.fused:
            inner.register_step_post_hook(lambda *_, mixed=optimizer: mixed.zero_grad())
        if drops:
            optimizer.register_step_post_hook(lambda *_, mixed=optimizer: mixed.zero_grad())
        step(optimizer, [param], 2.0**-5, "step")
        expected.append((param.tolist(), optimizer.loss_scale))
    assert expected[0] == expected[1]
    assert expected[1][1] == 2.0 ** (16 - 2 + 4)
