"""The move of the loss scale in C, against the specification and against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from mpcore.backends import ScaleMove, compiled, reference
from mpcore.loss_scale import DynamicLossScale, initial_state, next_state
from mpcore.loss_scale.tensors import LossScaleTensors
from torch import Tensor

from mpcore_testing.bits import same_bits
from mpcore_testing.loss_scales import dynamic_scales

CPU = torch.device("cpu")
FLAGS = (torch.int32, torch.int64, torch.float32, torch.bool)


@given(
    dynamic_scales(),
    st.sampled_from([0.0, 0.1, 0.5, 2 / 3]),
    st.lists(st.booleans(), max_size=40),
)
def test_c_follows_the_specification_step_by_step(
    scale: DynamicLossScale, tolerance: float, history: list[bool]
) -> None:
    scale = replace(scale, tolerance=tolerance)
    state = initial_state(scale)
    tensors = LossScaleTensors.from_state(state, CPU)
    for bad in history:
        scale.advance_(tensors, torch.tensor(int(bad)), compiled.update_scale_)
        state = next_state(scale, state, found_inf=bad)
        assert tensors.to_state() == state


@st.composite
def moves(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A state, and a rule with numbers that `torch.amp.GradScaler` takes as well."""
    few, of_steps = draw(st.sampled_from([(0, 1), (1, 2), (1, 3), (999, 1000)]))
    low, high = sorted(draw(st.tuples(*[st.floats(1e-30, 1e30)] * 2)))
    counters = [draw(st.integers(0, 2**50)) for _ in range(4)]
    counters += [draw(st.integers(0, 9)), draw(st.integers(0, 9))]
    state = (
        draw(st.floats(2.0**-126, 2.0**126, width=32)),
        draw(st.integers(0, 12) | st.just(2**31 - 2)),
        draw(st.integers(0, 3)),
        counters,
    )
    return state, {
        "growth_factor": draw(st.floats(1.0, 1e30, exclude_min=True)),
        "backoff_factor": draw(st.floats(1e-30, 1.0, exclude_max=True)),
        "growth_interval": draw(st.integers(1, 12) | st.just(2**31 - 1)),
        "min_scale": low,
        "max_scale": high,
        "hysteresis": draw(st.integers(1, 3)),
        "refill": draw(st.integers(0, 3)),
        "tolerance": (few, of_steps),
    }


def tensors_of(state: tuple[Any, ...]) -> list[Tensor]:
    dtypes = (torch.float32, torch.int32, torch.int32, torch.int64)
    return [torch.tensor(value, dtype=d) for value, d in zip(state, dtypes, strict=True)]


@given(moves(), st.booleans(), st.sampled_from(FLAGS))
def test_c_has_the_bits_of_the_reference_from_any_state(
    move: tuple[Any, Any], bad: bool, dtype: torch.dtype
) -> None:
    state, rule = move
    found = []
    for backend in (reference, compiled):
        tensors = tensors_of(state)
        backend.update_scale_(ScaleMove(*tensors, **rule), torch.tensor(bad).to(dtype))
        found.append(tensors)
    assert same_bits(*found)


@example(2.0**98, 10.0, 0.5, 1, [False] * 12)  # reaches the largest scale
@given(
    st.floats(2.0**-100, 2.0**100, width=32),
    st.floats(1.0, 64.0, exclude_min=True),
    st.floats(0.01, 1.0, exclude_max=True),
    st.integers(1, 4),
    st.lists(st.booleans(), max_size=12),
)
def test_c_moves_the_scale_as_the_kernel_of_torch_does(
    scale: float, growth: float, backoff: float, interval: int, history: list[bool]
) -> None:
    ours = tensors_of((scale, 0, 1, [0] * 6))
    theirs = tensors_of((scale, 0, 1, [0] * 6))
    rule = {**RULE, "growth_factor": growth, "backoff_factor": backoff}
    rule |= {"min_scale": 2.0**-126, "max_scale": 2.0**127, "growth_interval": interval}
    move = ScaleMove(*ours, **rule)
    for bad in history:
        before = theirs[0].item()
        if not before * backoff >= 2.0**-126 or not before * growth <= 2.0**127:
            break  # torch has no bounds: it shrinks to 0, and stays where growth would overflow
        compiled.update_scale_(move, torch.tensor(int(bad)))
        found_inf = torch.tensor(float(bad))
        torch._amp_update_scale_(theirs[0], theirs[1], found_inf, growth, backoff, interval)
        assert same_bits(ours[:2], theirs[:2])


RULE: dict[str, Any] = {
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 1,
    "min_scale": 1.0,
    "max_scale": 2.0**20,
    "hysteresis": 1,
    "refill": 0,
    "tolerance": (0, 1),
}


def test_autograd_hears_of_every_write() -> None:
    tensors = tensors_of((8.0, 0, 1, [0] * 6))
    before = [tensor._version for tensor in tensors]
    compiled.update_scale_(ScaleMove(*tensors, **RULE), torch.tensor(0))
    assert all(t._version > b for t, b in zip(tensors, before, strict=True))
    assert tensors[0].item() == 16.0


@pytest.mark.parametrize("bad", [0, 1])
def test_views_are_written_and_nothing_around_them(bad: int) -> None:
    scales, counts, left = torch.full((3,), 8.0), *(torch.ones(3).int() for _ in range(2))
    counters = torch.arange(18)
    move = ScaleMove(scales[1], counts[1], left[1], counters[6:12], **RULE)
    compiled.update_scale_(move, torch.tensor(bad))
    assert scales.tolist() == [8.0, 4.0 if bad else 16.0, 8.0]
    assert (counts.tolist()[::2], left.tolist()[::2]) == ([1, 1], [1, 1])
    assert counters.tolist()[:6] == list(range(6))
    assert counters.tolist()[12:] == list(range(12, 18))
    assert counters[6].item() == 7


def test_counters_with_gaps_move_as_well() -> None:
    found = []
    for backend in (reference, compiled):
        scale, tracker, left, _ = tensors_of((8.0, 0, 1, [0] * 6))
        wide = torch.zeros(6, 2, dtype=torch.int64)
        move = ScaleMove(scale, tracker, left, wide[:, 0], **RULE)
        backend.update_scale_(move, torch.tensor(1))
        found.append([scale, tracker, left, wide])
    assert same_bits(*found)
    assert found[1][3][0, 0].item() == 1
