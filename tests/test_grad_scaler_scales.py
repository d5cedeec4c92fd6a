"""Every loss scale drives a GradScaler."""

from __future__ import annotations

import copy
from typing import Any

import mpcore
import pytest
import torch
from mpcore.loss_scale import initial_state, next_state

from mpcore_testing.scalers import train, weight

INF = float("inf")
OURS = mpcore.GradScaler


@pytest.mark.parametrize(
    ("loss_scale", "expected"),
    [
        (mpcore.DynamicLossScale.megatron(), [2.0**32, 2.0**31, 2.0**30]),
        (mpcore.DynamicLossScale(init=8.0, hysteresis=2, refill="clean_or_backoff"), [8, 4, 4]),
        (mpcore.DynamicLossScale(init=8.0, min_scale=4.0), [4, 4, 4]),
        (mpcore.StaticLossScale(64.0), [64, 64, 64]),
        (mpcore.NoLossScale(), [1, 1, 1]),
        (mpcore.HeadroomLossScale(init=8.0, min_scale=2.0), [4, 2, 2]),
    ],
)
def test_every_loss_scale_can_drive_it(loss_scale: Any, expected: list[float]) -> None:
    param = weight(2)
    optimizer, scaler = torch.optim.SGD([param], lr=0.1), OURS.of(loss_scale, "cpu")
    scales = []
    for _ in range(3):
        train(scaler, optimizer, param, [INF])
        scales.append(scaler.get_scale())
    assert scales == expected
    assert (scaler.steps, scaler.skipped_steps) == (3, 3)
    assert param.tolist() == [1.0, 1.0]


def test_only_loss_scales_can() -> None:
    with pytest.raises(TypeError, match=r"expected DynamicLossScale.*got float"):
        OURS.of(1024.0, "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_a_computed_scale_leaves_room_above_the_largest_gradient(fused: bool, count: int) -> None:
    rule = mpcore.HeadroomLossScale(2.0**4, spare_bits=3, window=4)
    params = [weight(2) for _ in range(count)]
    optimizers = [torch.optim.SGD([param], lr=0.0, fused=fused) for param in params]
    scaler, state = OURS.of(rule, "cpu"), initial_state(rule)
    for number, exponent in enumerate([-3, -9, None, -12, -12, -12, -12, -12]):
        largest = INF if exponent is None else 2.0**exponent
        factors = [largest] + [largest / 8] * (count - 1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = sum((p * f).sum() for p, f in zip(params, factors, strict=True))
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        state = next_state(rule, state, found_inf=exponent is None, largest=largest)
        assert scaler.get_scale() == state.scale
        if number == 3:  # and goes on after saving
            other = OURS.of(rule, "cpu")
            other.load_state_dict(scaler.state_dict())
            scaler = copy.deepcopy(other)
    assert scaler.get_scale() == 2.0**24


@pytest.mark.parametrize("bad", [-1.0, INF, float("nan"), 1, "x", None])
def test_a_bad_peak_is_refused(bad: Any) -> None:
    scaler = OURS.of(mpcore.HeadroomLossScale(), "cpu")
    before = scaler.state_dict()
    with pytest.raises(AssertionError, match=r"^_peak must be a finite number >= 0"):
        scaler.load_state_dict({**before, "_peak": bad})
    assert scaler.state_dict() == before
