"""update_scale_ against the specification in plain Python, over arbitrary histories."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from mpcore import DynamicLossScale
from mpcore.backends import ScaleMove, reference
from mpcore.loss_scale import LossScaleState, initial_state, next_state
from mpcore.loss_scale.tensors import LossScaleTensors

from mpcore_kernels import update_scale_
from mpcore_testing.bits import same_bits

RULE = {
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2,
    "min_scale": 1.0,
    "max_scale": 2.0**24,
    "hysteresis": 2,
    "refill": 0,
    "tolerance": (0, 1),
}


#: shares of steps, and the same in whole numbers
TOLERANCES = {
    0.0: (0, 1),
    0.05: (1, 20),
    0.5: (1, 2),
    2 / 3: (2, 3),
    0.999999: (999_999, 1_000_000),
}


def rule_of(loss_scale):
    numbers = {name: getattr(loss_scale, name) for name in RULE}
    refill = {"growth": 0, "clean": 1, "clean_or_backoff": 3}[loss_scale.refill]
    tolerance = TOLERANCES[loss_scale.tolerance]
    return numbers | {"refill": refill, "tolerance": tolerance}


def placed(state, device):
    return LossScaleTensors.from_state(state, device)


def update(tensors, found_inf, device, **rule):
    state = (tensors.scale, tensors.growth_tracker, tensors.overflows_left, tensors.counters)
    flag = torch.tensor(found_inf, dtype=torch.int32, device=device)
    update_scale_(ScaleMove(*state, **rule), flag)


@st.composite
def loss_scales(draw):
    low, high = sorted(draw(st.tuples(st.integers(-126, 126), st.integers(-126, 126))))
    return DynamicLossScale(
        init=2.0 ** draw(st.integers(low, high)),
        growth_factor=2.0 ** draw(st.integers(1, 5)),
        backoff_factor=2.0 ** -draw(st.integers(1, 5)),
        growth_interval=draw(st.sampled_from([1, 2, 3, 16, 2**31 - 1])),
        min_scale=2.0**low,
        max_scale=2.0**high,
        hysteresis=draw(st.sampled_from([1, 2, 3, 16])),
        refill=draw(st.sampled_from(["growth", "clean", "clean_or_backoff"])),
        tolerance=draw(st.sampled_from(sorted(TOLERANCES))),
    )


@given(loss_scale=loss_scales(), history=st.lists(st.sampled_from([0, 0, 1, -1, 2]), max_size=25))
def test_update_scale_follows_the_specification_over_any_history(loss_scale, history, device):
    state = initial_state(loss_scale)
    tensors = placed(state, device)
    for found_inf in history:
        state = next_state(loss_scale, state, found_inf=found_inf != 0)
        update(tensors, found_inf, device, **rule_of(loss_scale))
        assert tensors.to_state() == state


@given(
    tracker=st.sampled_from([0, 1, 5, 2**31 - 2]),
    left=st.integers(-1, 3),
    steps=st.sampled_from([0, 2**31 - 1, 2**40]),
    since=st.sampled_from([0, 19, 2**31 - 1, 2**42]),
    overflows=st.sampled_from([0, 1, 2**30, 2**42]),
    tolerance=st.sampled_from(sorted(TOLERANCES)),
    scale=st.sampled_from([0.5, 1.0, 2.0]),
    found_inf=st.sampled_from([0, 1]),
)
def test_update_scale_goes_on_from_any_state(
    tracker, left, steps, since, overflows, tolerance, scale, found_inf, device
):
    loss_scale = DynamicLossScale(
        growth_interval=2**31 - 1, hysteresis=3, tolerance=tolerance, min_scale=1.0
    )
    counters = (steps, steps // 2, steps // 3, steps // 4, since, min(overflows, since))
    state = LossScaleState(scale, tracker, max(left, 0), *counters)
    tensors = placed(state, device)
    update(tensors, found_inf, device, **rule_of(loss_scale))
    assert tensors.to_state() == next_state(loss_scale, state, found_inf=bool(found_inf))


@pytest.mark.parametrize(
    ("refill", "history", "expected"),
    [  # init 16, hysteresis 2; "x" overflows, "." is clean: the tables of docs/loss-scaling.md
        (0, "x.x.x.x.x", [16, 16, 8, 8, 4, 4, 2, 2, 1]),
        (0, "xxxxxxxx", [16, 8, 4, 2, 1, 1, 1, 1]),
        (1, "x.x.x.x.x", [16] * 9),
        (1, "xxxxxxxx", [16, 8, 4, 2, 1, 1, 1, 1]),
        (3, "x.x.x.x.x", [16] * 9),
        (3, "xxxxxxxx", [16, 8, 8, 4, 4, 2, 2, 1]),
        (2, "xx.x.x.xx", [16, 8, 8, 8, 8, 4, 4, 4, 2]),
    ],
)
def test_update_scale_refills_when_it_is_told_to(refill, history, expected, device):
    tensors = placed(LossScaleState(16.0, 0, 2, 0, 0), device)
    scales = []
    for step in history:
        update(tensors, int(step == "x"), device, **RULE | {"refill": refill, "growth_interval": 9})
        scales.append(tensors.scale.item())
    assert scales == expected


@pytest.mark.parametrize(
    ("tolerance", "history", "expected"),
    [
        ((1, 2), ".x..xx", [16, 8, 8, 8, 8, 4]),  # one of two is the share itself; 1 of 3, 2 of 4
        ((1, 20), "x" + "." * 19 + "x", [8] * 20 + [4]),
        ((1, 20), "x" + "." * 20 + "x", [8] * 22),
        ((0, 1), ".x..xx", [16, 8, 8, 8, 4, 2]),
    ],
)
def test_update_scale_tolerates_what_is_below_the_share(tolerance, history, expected, device):
    tensors = placed(LossScaleState(16.0, 0, 1, 0, 0), device)
    rule = RULE | {"tolerance": tolerance, "growth_interval": 99, "hysteresis": 1}
    scales = []
    for step in history:
        update(tensors, int(step == "x"), device, **rule)
        scales.append(tensors.scale.item())
    assert scales == expected


@example(scale=8.75, growth=1.1, backoff=0.3, found_inf=1)
@example(scale=8.75, growth=1.1, backoff=0.3, found_inf=0)
@given(
    scale=st.floats(2.0**-20, 2.0**20, width=32),
    growth=st.floats(1.0, 64.0, exclude_min=True, width=32),
    backoff=st.floats(2.0**-10, 1.0, exclude_max=True, width=32),
    found_inf=st.sampled_from([0, 1]),
)
def test_update_scale_has_the_bits_of_the_reference_or_refuses(
    scale, growth, backoff, found_inf, device
):
    state = LossScaleState(scale, 1, 1, 0, 0)
    rule = RULE | {"growth_factor": growth, "backoff_factor": backoff, "min_scale": 2.0**-126}
    ours, theirs = placed(state, device), placed(state, device)
    tensors = (theirs.scale, theirs.growth_tracker, theirs.overflows_left, theirs.counters)
    flag = torch.tensor(found_inf, dtype=torch.int32, device=device)
    reference.update_scale_(ScaleMove(*tensors, **rule), flag)
    if all(float(np.float32(factor)) == factor for factor in (growth, backoff)):
        update(ours, found_inf, device, **rule)
        assert same_bits([ours.scale], [theirs.scale])
        assert ours.to_state() == theirs.to_state()
    else:
        with pytest.raises(ValueError, match="factor: expected a float32 number"):
            update(ours, found_inf, device, **rule)
        assert ours.to_state() == state


def test_update_scale_stays_within_its_bounds(device):
    tensors = placed(LossScaleState(2.0**24, 1, 2, 0, 0), device)
    update(tensors, 0, device, **RULE)
    assert tensors.scale.item() == 2.0**24
    tensors = placed(LossScaleState(1.0, 1, 1, 0, 0), device)
    update(tensors, 1, device, **RULE)
    assert tensors.scale.item() == 1.0


@pytest.mark.parametrize("found_inf", [1, -1, 256, 2**31 - 1, -(2**31)])
def test_update_scale_takes_any_found_inf_but_zero_for_an_overflow(found_inf, device):
    tensors = placed(LossScaleState(8.0, 1, 1, 5, 2), device)
    update(tensors, found_inf, device, **RULE)
    assert tensors.to_state() == LossScaleState(4.0, 0, 0, 6, 3, 1)


def test_update_scale_reads_and_writes_views_at_any_offset_and_nothing_around_them(device):
    for i in range(5):
        scales = torch.full((5,), 8.0, device=device)
        counts = torch.ones(5, dtype=torch.int32, device=device)
        left, many = torch.ones_like(counts), torch.ones(8, dtype=torch.int64, device=device)
        found_inf = torch.tensor(1, dtype=torch.int32, device=device)
        counters = many[i % 3 : i % 3 + 6]
        update_scale_(ScaleMove(scales[i], counts[i], left[i], counters, **RULE), found_inf)
        expected = [
            (scales, 4.0, 8.0),
            (counts, 0, 1),
            (left, 0, 1),
        ]
        for tensor, here, around in expected:
            assert tensor.tolist() == [here if j == i else around for j in range(5)]
        before, after = [1] * (i % 3), [1] * (2 - i % 3)
        assert many.tolist() == [*before, 2, 2, 2, 1, 0, 0, *after]


def test_update_scale_tells_autograd_what_it_wrote(device):
    tensors = placed(LossScaleState(8.0, 1, 1, 5, 2), device)
    written = [tensors.scale, tensors.growth_tracker, tensors.overflows_left]
    written.append(tensors.counters)
    versions = [tensor._version for tensor in written]
    update(tensors, 1, device, **RULE)
    assert all(t._version > v for t, v in zip(written, versions, strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("growth_factor", 1.0),
        ("growth_factor", math.inf),
        ("backoff_factor", 0.0),
        ("backoff_factor", 1.0),
        # no float32 numbers: rounded by a launch, they would miss the reference in the last place
        ("growth_factor", 1.1),
        ("growth_factor", 1e300),
        ("backoff_factor", 0.3),
        ("backoff_factor", 1e-300),
        ("growth_interval", 0),
        ("growth_interval", 2**31),
        ("hysteresis", 0),
        ("refill", 4),
        ("tolerance", (-1, 2)),
        ("tolerance", (2, 2)),
        ("tolerance", (1, 2_000_000)),
        ("min_scale", 0.0),
        ("max_scale", math.inf),
        ("max_scale", math.nan),
    ],
)
def test_update_scale_refuses_impossible_numbers_and_writes_nothing(name, value, device):
    tensors = placed(LossScaleState(8.0, 1, 1, 5, 2), device)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        update(tensors, 1, device, **(RULE | {name: value}))
    assert tensors.to_state() == LossScaleState(8.0, 1, 1, 5, 2)


def test_update_scale_refuses_wrong_dtypes_and_counts(device):
    tensors = placed(LossScaleState(8.0, 1, 1, 5, 2), device)
    with pytest.raises(TypeError, match="hysteresis: expected an integer"):
        update(tensors, 1, device, **(RULE | {"hysteresis": 1.0}))
    with pytest.raises(TypeError, match="refill: expected an integer"):
        update(tensors, 1, device, **(RULE | {"refill": True}))
    tensors.counters = tensors.counters.int()
    with pytest.raises(ValueError, match="counters: expected a contiguous"):
        update(tensors, 1, device, **RULE)
