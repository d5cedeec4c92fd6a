"""One bad value anywhere: what must be skipped is skipped, everything else has the same bits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.devices import FIRST, SECOND, SimulatedDevices
from mpcore_testing.engines import ENGINES, Engine
from mpcore_testing.snapshots import snapshot

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
ITERATIONS, BATCHES, TENSORS, LOSSES = 3, 2, 3, 2
BAD = [math.inf, -math.inf, math.nan]


def parameters(dtypes: list[torch.dtype]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, 5 + i).to(d)) for i, d in enumerate(dtypes)]


def losses(params: list[nn.Parameter], step: int, batch: int, spoil: Any) -> list[torch.Tensor]:
    """Two losses over all parameters; `spoil` multiplies one parameter's part of one of them."""
    result = []
    for number in range(LOSSES):
        generator = torch.Generator().manual_seed(100 * step + 10 * batch + number)
        terms = []
        for index, param in enumerate(params):
            noise = torch.randn(param.shape, generator=generator)
            if spoil is not None and spoil[:4] == (step, batch, number, index):
                noise[-1] = spoil[4]
            terms.append((param.float() * noise).sum())
        result.append(torch.stack(terms).sum())
    return result


def train(engine: Engine, spoil: Any) -> tuple[list[Any], list[bool], list[float]]:
    """Snapshots after each iteration, what was skipped, and the scales."""
    params = parameters([HALF, BRAIN, FULL])
    optimizer = engine.wrap(
        torch.optim.AdamW(params, lr=0.1, weight_decay=0.1), mpcore.DynamicLossScale(init=8.0)
    )
    seen, skipped, scales = [], [], []
    for step in range(ITERATIONS):
        for batch in range(BATCHES):
            for loss in losses(params, step, batch, spoil):
                optimizer.backward(loss)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        skipped.append(optimizer.last_step.skipped)
        if skipped[-1]:
            assert optimizer.last_step.overflowed() == [
                f"group 0, parameter {spoil[3]}, [{5 + spoil[3]}]"
            ]
        scales.append(optimizer.loss_scale)
        optimizer.zero_grad()
        seen.append(snapshot(optimizer))
    return seen, skipped, scales


def without(engine: Engine, left_out: int) -> Any:
    """The last snapshot of a run that has one iteration less; its scale moves as after a skip."""
    params = parameters([HALF, BRAIN, FULL])
    optimizer = engine.wrap(
        torch.optim.AdamW(params, lr=0.1, weight_decay=0.1), mpcore.DynamicLossScale(init=8.0)
    )
    for step in range(ITERATIONS):
        if step == left_out:
            continue
        for batch in range(BATCHES):
            for loss in losses(params, step, batch, None):
                # the scales of the spoilt run: gradients in 16 bits are rounded after scaling
                scale = 8.0 if step < left_out else 4.0
                assert optimizer.loss_scale == 8.0
                (loss * scale).backward()
        optimizer.scale(torch.ones(()))
        for param in params:
            param.grad.mul_(8.0 / scale)  # exact
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(optimizer)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("iteration", range(ITERATIONS))
def test_one_bad_value_skips_its_iteration_and_leaves_no_other_trace(
    engine: Engine, iteration: int
) -> None:
    clean, _, _ = train(engine, None)
    expected = without(engine, iteration)
    places = itertools.product(range(BATCHES), range(LOSSES), range(TENSORS))
    for number, (batch, loss, tensor) in enumerate(places):
        spoil = (iteration, batch, loss, tensor, BAD[number % len(BAD)])
        seen, skipped, scales = train(engine, spoil)
        assert skipped == [step == iteration for step in range(ITERATIONS)]
        assert scales == [8.0 if step < iteration else 4.0 for step in range(ITERATIONS)]
        if iteration:
            assert same_bits(seen[iteration - 1], clean[iteration - 1])
            assert same_bits(seen[iteration], seen[iteration - 1])
        assert same_bits(seen[-1]["weights"], expected["weights"])
        assert same_bits(seen[-1]["state"], expected["state"])


def scaled_twice(spoil: Any) -> tuple[list[Any], list[list[bool]], list[float]]:
    """One GradScaler, two optimizers, two losses over all parameters."""
    params = parameters([FULL] * TENSORS)
    optimizers = [
        torch.optim.AdamW(params[:1], lr=0.1),
        torch.optim.AdamW(params[1:], lr=0.1, fused=True),
    ]
    scaler = mpcore.GradScaler("cpu", init_scale=8.0)
    seen, skipped, scales = [], [], []
    for step in range(ITERATIONS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for batch in range(BATCHES):
            for loss in losses(params, step, batch, spoil):
                scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        skipped.append([scaler.last_step_of(optimizer).skipped for optimizer in optimizers])
        scaler.update()
        scales.append(scaler.get_scale())
        seen.append([p.detach().clone() for p in params])
    return seen, skipped, scales


@pytest.mark.parametrize("iteration", range(ITERATIONS))
def test_one_bad_value_skips_the_one_optimizer_that_it_belongs_to(iteration: int) -> None:
    clean, _, _ = scaled_twice(None)
    places = itertools.product(range(BATCHES), range(LOSSES), range(TENSORS))
    for number, (batch, loss, tensor) in enumerate(places):
        spoil = (iteration, batch, loss, tensor, BAD[number % len(BAD)])
        seen, skipped, scales = scaled_twice(spoil)
        hit = [tensor == 0, tensor != 0]
        assert skipped == [
            hit if step == iteration else [False, False] for step in range(ITERATIONS)
        ]
        assert scales == [8.0 if step < iteration else 4.0 for step in range(ITERATIONS)]
        before = parameters([FULL] * TENSORS) if iteration == 0 else seen[iteration - 1]
        here = slice(0, 1) if tensor == 0 else slice(1, None)
        other = slice(1, None) if tensor == 0 else slice(0, 1)
        assert same_bits(seen[iteration][here], [p.detach() for p in before][here])
        # powers of two scale float32 exactly: the other optimizer cannot tell
        assert all(same_bits(s[other], c[other]) for s, c in zip(seen, clean, strict=True))


@pytest.mark.parametrize("spoilt", range(4))
def test_an_overflow_on_one_device_skips_the_optimizer_on_every_device(spoilt: int) -> None:
    with SimulatedDevices():
        params = [
            nn.Parameter(torch.ones(2, device=device)) for device in (FIRST, SECOND, FIRST, SECOND)
        ]
        optimizer = torch.optim.SGD(params, lr=1.0, foreach=False)
        scaler = mpcore.GradScaler("meta", init_scale=4.0)
        for overflow in (True, False):
            scaler.scale(torch.ones((), device=FIRST))
            for number, param in enumerate(params):
                value = math.inf if overflow and number == spoilt else scaler.get_scale()
                param.grad = torch.full_like(param, value)
            scaler.step(optimizer)
            assert scaler.last_step.skipped == overflow
            if overflow:
                names = [f"group 0, parameter {spoilt}, [2]"]
                assert scaler.last_step.overflowed() == names
            scaler.update()
            expected = [1.0, 1.0] if overflow else [0.0, 0.0]
            assert [param.values.tolist() for param in params] == [expected] * 4
        assert scaler.get_scale() == 2.0
