"""The loss scale's rule: the specification, the device tensors, and oracles that share no code."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore.errors import ArgumentError, ArgumentTypeError
from mpcore.loss_scale import (
    DynamicLossScale,
    LossScaleState,
    NoLossScale,
    StaticLossScale,
    check_loss_scale,
    initial_state,
    next_state,
    tolerated,
)
from mpcore.loss_scale.tensors import LossScaleTensors

CPU = torch.device("cpu")
HISTORIES = st.lists(st.booleans(), max_size=40)


@st.composite
def dynamic_scales(draw: st.DrawFn) -> DynamicLossScale:
    low, init, high = sorted(draw(st.tuples(*[st.integers(-126, 126)] * 3)))
    return DynamicLossScale(
        init=2.0**init,
        growth_factor=2.0 ** draw(st.sampled_from([1, 1, 2, 5, 126])),
        backoff_factor=2.0 ** -draw(st.sampled_from([1, 1, 2, 5, 126])),
        growth_interval=draw(st.integers(1, 5)),
        min_scale=2.0**low,
        max_scale=2.0**high,
        hysteresis=draw(st.integers(1, 4)),
        refill=draw(st.sampled_from(["growth", "clean", "clean_or_backoff"])),
        tolerance=draw(st.sampled_from([0.0, 0.0, 0.1, 0.3, 0.5, 2 / 3, 0.9])),
    )


STATIC_SCALES = st.integers(-126, 126).map(lambda e: StaticLossScale(2.0**e))
ALL_SCALES = dynamic_scales() | STATIC_SCALES | st.just(NoLossScale())


def exponents(scale: DynamicLossScale, history: list[bool]) -> list[int]:
    """An oracle in whole exponents: counts overflows that weigh, has no budget."""
    names = ("init", "growth_factor", "backoff_factor", "min_scale", "max_scale")
    log2 = {name: int(math.log2(getattr(scale, name))) for name in names}
    exponent, overflows, clean, seen, moved = log2["init"], 0, 0, [], 0
    for now, bad in enumerate(history, start=1):
        clean = 0 if bad else clean + 1
        overflows += bad
        share = sum(history[moved:now]) / (now - moved)
        if bad and overflows >= scale.hysteresis and share >= scale.tolerance:
            exponent = max(exponent + log2["backoff_factor"], log2["min_scale"])
            overflows = 0 if scale.refill == "clean_or_backoff" else overflows
            moved = now
        if not bad and scale.refill.startswith("clean"):
            overflows = 0
        if clean == scale.growth_interval:
            exponent = min(exponent + log2["growth_factor"], log2["max_scale"])
            clean, overflows, moved = 0, 0, now
        seen.append(exponent)
    return seen


def states(scale: Any, history: list[bool]) -> list[LossScaleState]:
    seen = [initial_state(scale)]
    for bad in history:
        seen.append(next_state(scale, seen[-1], found_inf=bad))
    return seen[1:]


def tensor_states(scale: Any, history: list[bool]) -> list[LossScaleState]:
    tensors, seen = LossScaleTensors.from_state(initial_state(scale), CPU), []
    for bad in history:
        scale.advance_(tensors, torch.tensor(int(bad), dtype=torch.int32))
        seen.append(tensors.to_state())
    return seen


@given(ALL_SCALES, HISTORIES)
def test_the_tensors_follow_the_specification_step_by_step(scale: Any, history: list[bool]) -> None:
    assert tensor_states(scale, history) == states(scale, history)


@given(
    dynamic_scales(),
    st.integers(-126, 126),
    st.integers(0, 2**31 - 2),
    st.integers(0, 2**31 - 1),
    st.tuples(st.integers(0, 2**42), st.integers(0, 2**42)),
    st.booleans(),
)
def test_the_tensors_follow_the_specification_from_any_loaded_state(
    scale: DynamicLossScale,
    exponent: int,
    tracker: int,
    left: int,
    since: tuple[int, int],
    bad: bool,
) -> None:
    counters = (2**40, 2**39, 2**33, 2**35, *since)
    state = LossScaleState(2.0**exponent, tracker, left, *counters)
    tensors = LossScaleTensors.from_state(state, CPU)
    assert tensors.to_state() == state
    scale.advance_(tensors, torch.tensor(bad))
    assert tensors.to_state() == next_state(scale, state, found_inf=bad)


@given(dynamic_scales(), HISTORIES)
def test_the_specification_equals_an_oracle_in_whole_exponents(
    scale: DynamicLossScale, history: list[bool]
) -> None:
    scales = [state.scale for state in states(scale, history)]
    assert scales == [2.0**exponent for exponent in exponents(scale, history)]


@given(ALL_SCALES, HISTORIES)
def test_steps_and_skips_are_counted_whatever_the_kind_of_scale(
    scale: Any, history: list[bool]
) -> None:
    for number, state in enumerate(states(scale, history), start=1):
        assert (state.steps, state.skipped_steps) == (number, sum(history[:number]))
        clean_ones = [i for i, bad in enumerate(history[:number], start=1) if not bad]
        assert state.skips_in_a_row == number - max(clean_ones, default=0)
        assert isinstance(scale, DynamicLossScale) or state.scale == initial_state(scale).scale


@given(
    st.lists(st.booleans(), max_size=60),
    st.sampled_from([2.0, 4.0]),
    st.sampled_from([0.5, 0.25]),
    st.integers(1, 4),
)
def test_without_hysteresis_the_scale_moves_as_torchs_does(
    history: list[bool], growth: float, backoff: float, interval: int
) -> None:
    # 60 steps by factors of 4 from 1 stay within 2^-120 and 2^120: no bound is reached
    scale = DynamicLossScale(1.0, growth, backoff, interval, 2.0**-126, 2.0**126)
    theirs, tracker = torch.ones(()), torch.zeros((), dtype=torch.int32)
    for state, bad in zip(states(scale, history), history, strict=True):
        found_inf = torch.tensor(float(bad))
        torch._amp_update_scale_(theirs, tracker, found_inf, growth, backoff, interval)
        assert (state.scale, state.growth_tracker) == (theirs.item(), tracker.item())


@pytest.mark.parametrize(
    ("history", "hysteresis", "expected"),
    [  # init 16, interval 4, floor 1; "x" overflows, "." is clean; the scale after each step
        (".........", 2, [16, 16, 16, 32, 32, 32, 32, 64, 64]),
        ("x.x.x.x.x", 2, [16, 16, 8, 8, 4, 4, 2, 2, 1]),
        ("xxxxxxxx", 2, [16, 8, 4, 2, 1, 1, 1, 1]),
        ("x.x.x.x.x", 1, [8, 8, 4, 4, 2, 2, 1, 1, 1]),
        ("xx....xx", 2, [16, 8, 8, 8, 8, 16, 16, 8]),  # growth refills the tolerance
        ("x...x...x", 3, [16, 16, 16, 16, 16, 16, 16, 16, 8]),  # clean steps do not
    ],
)
@pytest.mark.parametrize("follow", [states, tensor_states])
def test_hysteresis_matches_the_table_of_megatron(
    follow: Any, history: str, hysteresis: int, expected: list[int]
) -> None:
    scale = DynamicLossScale(16.0, growth_interval=4, hysteresis=hysteresis)
    assert [s.scale for s in follow(scale, [c == "x" for c in history])] == expected


@given(dynamic_scales(), HISTORIES)
def test_a_scale_stays_a_power_of_two_within_its_bounds(
    scale: DynamicLossScale, history: list[bool]
) -> None:
    for state in tensor_states(scale, history):
        assert math.frexp(state.scale)[0] == 0.5
        assert scale.min_scale <= state.scale <= scale.max_scale
        assert 0 <= state.growth_tracker < scale.growth_interval


def test_300000_clean_steps_never_reach_infinity() -> None:
    end = states(DynamicLossScale(max_scale=2.0**126), [False] * 300_000)[-1]
    assert end == LossScaleState(2.0**126, 0, 1, 300_000, 0)
    scale = DynamicLossScale(growth_interval=1, max_scale=2.0**126)  # as many growths, one a step
    assert tensor_states(scale, [False] * 150)[-1] == LossScaleState(2.0**126, 0, 1, 150, 0)


def test_1000_overflows_never_reach_zero() -> None:
    scale = DynamicLossScale(min_scale=2.0**-126)
    # 2^16 reaches it by 142 halvings
    expected = LossScaleState(2.0**-126, 0, 0, 1000, 1000, 1000, 1000 - 142)
    for follow in (states, tensor_states):
        assert follow(scale, [True] * 1000)[-1] == expected
    assert math.isfinite(torch.tensor(expected.scale).reciprocal().item())


@pytest.mark.parametrize("follow", [states, tensor_states])
def test_the_scale_grows_exactly_at_the_interval_and_an_overflow_restarts_it(follow: Any) -> None:
    scale = DynamicLossScale(8.0, growth_interval=2000 if follow is states else 50)
    interval = scale.growth_interval
    history = [False] * (interval - 1) + [True] + [False] * (2 * interval)
    scales = [state.scale for state in follow(scale, history)]
    assert scales == [8.0] * (interval - 1) + [4.0] * interval + [8.0] * interval + [16.0]


@pytest.mark.parametrize("found_inf", [True, 2, -1, 0.5])
def test_any_non_zero_found_inf_is_an_overflow(found_inf: float) -> None:
    tensors = LossScaleTensors.from_state(initial_state(DynamicLossScale()), CPU)
    DynamicLossScale().advance_(tensors, torch.tensor(found_inf))
    assert tensors.to_state() == LossScaleState(2.0**15, 0, 0, 1, 1, 1)


def test_the_tensors_are_changed_in_place_and_keep_their_dtypes() -> None:
    tensors = LossScaleTensors.from_state(initial_state(DynamicLossScale(growth_interval=1)), CPU)
    before = [getattr(tensors, field.name) for field in dataclasses.fields(tensors)]
    for bad in (False, True):
        DynamicLossScale(growth_interval=1).advance_(tensors, torch.tensor(bad))
    tensors.assign_(LossScaleState(4.0, 3, 2, 1, 0))
    after = [getattr(tensors, field.name) for field in dataclasses.fields(tensors)]
    assert all(a is b for a, b in zip(before, after, strict=True))
    kinds = (torch.float32, torch.int32, torch.int32, torch.int64)
    kinds += (torch.float64, torch.float64)
    assert tuple(tensor.dtype for tensor in after) == kinds
    assert tensors.to_state() == LossScaleState(4.0, 3, 2, 1, 0)


NOT_SCALES = [0, -2.0, 3.0, 0.3, math.inf, -math.inf, math.nan, 2.0**127, 2.0**-127]
NOT_NUMBERS = ["65536", True, None, [2.0], torch.tensor(2.0)]
SCALES = ("init", "min_scale", "max_scale")
FACTORS = ("growth_factor", "backoff_factor")
COUNTS = ("growth_interval", "hysteresis")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(SCALES, NOT_SCALES),
        *itertools.product(FACTORS, (1.0, 0, -2.0, 3.0, 0.3, math.inf, math.nan)),
        *[("growth_factor", 0.5), ("backoff_factor", 2.0)],
        *[("growth_factor", 2.0**128), ("backoff_factor", 2.0**-150)],  # infinite, 0 in float32
        *itertools.product(COUNTS, (0, -1, 2**31)),
    ],
)
def test_a_dynamic_scale_rejects_and_names_an_impossible_value(name: str, value: float) -> None:
    got = f"({re.escape(repr(value))}|{re.escape(f'{value:g}')})"
    with pytest.raises(ArgumentError, match=rf"^{name}: expected an? .+, got {got}\."):
        DynamicLossScale(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(SCALES + FACTORS, NOT_NUMBERS),
        *itertools.product(COUNTS, (2.0, True, "3", None)),
    ],
)
def test_a_dynamic_scale_rejects_and_names_a_wrong_type(name: str, value: Any) -> None:
    got = type(value).__name__
    with pytest.raises(ArgumentTypeError, match=rf"^{name}: expected an? .+, got {got}\."):
        DynamicLossScale(**{name: value})


@pytest.mark.parametrize(
    ("value", "error"),
    [
        *((value, ArgumentError) for value in NOT_SCALES),
        *((value, ArgumentTypeError) for value in NOT_NUMBERS),
    ],
)
def test_a_static_scale_rejects_what_is_no_power_of_two_in_range(
    value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"^scale: expected a .+, got .+"):
        StaticLossScale(value)


@pytest.mark.parametrize("name", SCALES + FACTORS)
def test_an_integer_too_large_for_a_float_is_a_bad_argument_too(name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^{name}: expected a"):
        DynamicLossScale(**{name: 2**2000})


@pytest.mark.parametrize(
    "arguments",
    [
        {"init": 2.0**25},
        {"init": 0.5},
        {"init": 4.0, "min_scale": 8.0, "max_scale": 2.0},
        {"min_scale": 2.0**17},
        {"max_scale": 2.0**15},
    ],
)
def test_a_dynamic_scale_rejects_an_init_outside_its_bounds(arguments: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=r"init: expected .*min_scale, max_scale.*, got \S+\. "):
        DynamicLossScale(**arguments)


@pytest.mark.parametrize("value", [-0.1, 1.0, 2, math.nan, math.inf])
def test_a_tolerance_is_a_share(value: float) -> None:
    with pytest.raises(ArgumentError, match=r"^tolerance: expected a share from 0 to below 1, got"):
        DynamicLossScale(tolerance=value)


@pytest.mark.parametrize("value", [1 - 2.0**-53, 0.9999999, 1e-9, 0.0, 1 / 3])
def test_a_tolerance_in_whole_numbers_is_one_that_kernels_take(value: float) -> None:
    few, of_steps = tolerated(value)
    assert 0 <= few < of_steps <= 10**6
    assert abs(few / of_steps - value) <= 1e-6


@pytest.mark.parametrize("value", ["x", "", None, True])
def test_what_happens_at_the_minimum_is_one_of_three_things(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^at_min: expected one of 'clamp', 'warn', 'raise'"):
        DynamicLossScale(at_min=value)


@pytest.mark.parametrize("follow", [states, tensor_states])
def test_overflows_at_the_minimum_are_those_that_could_not_lower_the_scale(follow: Any) -> None:
    scale = DynamicLossScale(2.0, min_scale=1.0, hysteresis=2, growth_interval=3)
    history = [c == "x" for c in "xx.xx.x...xx.x"]
    counted = [state.overflows_at_min for state in follow(scale, history)]
    # the budget is used up by the second; growth to 2 at the tenth fills it up
    assert counted == [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 4]


def test_the_edges_of_every_range_are_accepted() -> None:
    DynamicLossScale(2.0**-126, 2.0**126, 2.0**-126, 2**31 - 1, 2.0**-126, 2.0**126, 2**31 - 1)
    assert initial_state(StaticLossScale(2.0**126)).scale == 2.0**126
    assert initial_state(StaticLossScale(1)).scale == 1.0


@pytest.mark.parametrize("value", [1024.0, None, DynamicLossScale])
def test_only_the_three_kinds_are_loss_scales(value: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^loss_scale: expected DynamicLossScale.*, got"):
        check_loss_scale(value)


@pytest.mark.parametrize("scale", [DynamicLossScale(), StaticLossScale(8.0), NoLossScale()])
def test_a_scale_is_a_frozen_value(scale: Any) -> None:
    name = "init" if isinstance(scale, DynamicLossScale) else "scale"
    with pytest.raises(AttributeError):
        setattr(scale, name, 4.0)
    assert check_loss_scale(scale) == scale
