"""Gradients of several backward passes, added up in float32."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import mpcore
import numpy as np
import pytest
import torch
from mpcore.engine.gradients import StepGradients
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import FUSED, Engine
from mpcore_testing.snapshots import snapshot

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
SCALE = 2.0**6


def parameters() -> list[nn.Parameter]:
    return [
        nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4).to(dtype))
        for dtype in (HALF, BRAIN, FULL)
    ]


def wrapped(engine: Engine, params: Any, scale: Any = None) -> Any:
    inner = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1)
    return engine.wrap(inner, scale or mpcore.StaticLossScale(SCALE))


def put_gradients(optimizer: Any, params: list[nn.Parameter], seed: int) -> list[np.ndarray]:
    """Gives each parameter a scaled gradient; returns them unscaled, in float32, by NumPy."""
    optimizer.scale(torch.ones(()))
    generator, unscaled = torch.Generator().manual_seed(seed), []
    for param in params:
        noise = torch.randn(param.shape, generator=generator)
        param.grad = (noise * SCALE).to(param.dtype)
        unscaled.append(param.grad.float().numpy() * np.float32(1 / SCALE))
    return unscaled


def test_sums_are_those_of_numpy_in_float32_bit_for_bit(engine: Engine) -> None:
    params = parameters()
    optimizer = wrapped(engine, params)
    sums = [np.zeros((3, 4), np.float32) for _ in params]
    for number in range(7):
        for total, grad in zip(sums, put_gradients(optimizer, params, number), strict=True):
            total[...] = grad if number == 0 else total + grad
        if number < 6:
            optimizer.accumulate()
            assert [param.grad for param in params] == [None] * 3
    optimizer.unscale_()  # adds what the last pass left
    assert [grad.numpy().tobytes() for grad in optimizer.grads()] == [s.tobytes() for s in sums]


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_what_16_bits_would_lose_is_kept(engine: Engine, dtype: torch.dtype) -> None:
    kept = {}
    for accumulates in (False, True):
        param = nn.Parameter(torch.zeros(2, dtype=dtype))
        optimizer = engine.wrap(torch.optim.SGD([param], lr=1.0), mpcore.StaticLossScale(2.0))
        for size in [1.0] + [2.0**-12] * 64:
            optimizer.backward((param.float() * size).sum())
            if accumulates:
                optimizer.accumulate()
        optimizer.step()
        kept[accumulates] = optimizer.state[param]["master"].tolist()
    assert kept == {False: [-1.0] * 2, True: [-1.0 - 2.0**-6] * 2}


def test_one_pass_that_is_accumulated_is_a_step_like_any_other(engine: Engine) -> None:
    seen = []
    for accumulates in (False, True):
        params = parameters()
        optimizer = wrapped(engine, params)
        for number in range(3):
            put_gradients(optimizer, params, number)
            if accumulates:
                optimizer.accumulate()
            optimizer.step()
            optimizer.zero_grad()
        seen.append(snapshot(optimizer))
    assert same_bits(*seen)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("tensor", [0, 1, 2])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_an_overflow_in_any_pass_skips_the_step_and_is_named(
    engine: Engine, batch: int, tensor: int, bad: float
) -> None:
    params = parameters()
    optimizer = wrapped(engine, params, mpcore.DynamicLossScale(SCALE))
    put_gradients(optimizer, params, 9)
    optimizer.step()
    optimizer.zero_grad()
    before = snapshot(optimizer)
    for number in range(3):
        put_gradients(optimizer, params, number)
        if number == batch:
            params[tensor].grad[1, 2] = bad
        optimizer.accumulate()
    optimizer.step()
    name = f"group 0, parameter {tensor}, [3, 4]"
    assert optimizer.last_step.skipped
    assert optimizer.last_step.overflowed() == [name]
    assert optimizer.last_step.overflowed_in() == [(batch, "", (name,))]
    assert optimizer.loss_scale == SCALE / 2
    optimizer.zero_grad()
    assert same_bits(snapshot(optimizer), before)
    put_gradients(optimizer, params, 4)  # nothing of it is left
    optimizer.step()
    assert not optimizer.last_step.skipped
    assert optimizer.last_step.overflowed_in() == []


def test_sums_that_overflow_where_no_gradient_does_skip_too(engine: Engine) -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = engine.wrap(torch.optim.SGD([param], lr=1.0), mpcore.NoLossScale())
    for _ in range(2):
        param.grad = torch.tensor([3e38, 0.0])
        optimizer.accumulate()
    optimizer.step()
    assert optimizer.last_step.skipped
    assert optimizer.last_step.overflowed() == ["group 0, parameter 0, [2]"]
    assert param.tolist() == [1.0, 1.0]


def test_clipping_unscaling_and_edits_work_on_sums(engine: Engine) -> None:
    params = [nn.Parameter(torch.zeros(4).half()), nn.Parameter(torch.zeros(4))]
    optimizer = engine.wrap(torch.optim.SGD(params, lr=1.0), mpcore.StaticLossScale(4.0))
    for _ in range(2):
        optimizer.backward(sum(param.float().sum() for param in params))
        optimizer.accumulate()
    assert float(optimizer.clip_grad_norm_(2.0**-1)) == pytest.approx(math.sqrt(32), rel=1e-6)
    assert optimizer.last_step is None
    optimizer.unscale_()
    for grad in optimizer.grads():
        assert grad.tolist() == pytest.approx([0.5 / math.sqrt(8)] * 4, rel=1e-5)
    optimizer.grads()[0].fill_(8.0)
    with pytest.raises(mpcore.StageError, match="second one"):
        optimizer.unscale_()
    optimizer.step()
    assert params[0].tolist() == [-8.0] * 4
    assert float(optimizer.last_step.grad_norm) == pytest.approx(math.sqrt(32), rel=1e-6)


def test_parameters_may_take_part_in_some_passes_only(engine: Engine) -> None:
    params = [nn.Parameter(torch.zeros(2).half()) for _ in range(3)]
    optimizer = engine.wrap(torch.optim.SGD(params, lr=1.0), mpcore.StaticLossScale(4.0))
    for used in ([0], [0, 1], [1]):
        optimizer.backward(sum(params[i].float().sum() for i in used))
        optimizer.accumulate()
    optimizer.accumulate()  # nothing new: nothing happens
    optimizer.step()
    assert [param[0].item() for param in params] == [-2.0, -2.0, 0.0]


def test_zero_grad_drops_the_sums(engine: Engine) -> None:
    param = nn.Parameter(torch.zeros(2).half())
    optimizer = engine.wrap(torch.optim.SGD([param], lr=1.0), mpcore.StaticLossScale(4.0))
    optimizer.backward(param.float().sum() * 5)
    optimizer.accumulate()
    optimizer.zero_grad()
    optimizer.backward(param.float().sum())
    optimizer.step()
    assert param.tolist() == [-1.0, -1.0]


def test_calls_at_the_wrong_moment_are_refused(engine: Engine) -> None:
    param = nn.Parameter(torch.zeros(2).half())
    optimizer = engine.wrap(torch.optim.SGD([param], lr=1.0), mpcore.StaticLossScale(4.0))
    param.grad = torch.ones(2).half()
    with pytest.raises(mpcore.StageError, match=r"^accumulate\(\): expected .*got no scale"):
        optimizer.accumulate()
    optimizer.backward(param.float().sum())
    optimizer.accumulate()
    optimizer.unscale_()
    with pytest.raises(mpcore.StageError, match=r"^accumulate\(\): expected .*before unscale_"):
        optimizer.accumulate()
    with pytest.raises(
        mpcore.StageError, match=r"^a backward pass to .*: expected .*before unscale_"
    ):
        param.float().sum().backward()
    optimizer.zero_grad()
    optimizer.backward(param.float().sum())
    optimizer.accumulate()
    optimizer.clip_grad_norm_(1.0)
    param.grad = torch.ones(2).half()  # a backward pass after clipping
    with pytest.raises(mpcore.StageError, match=r"got a new one of group 0, parameter 0"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.scale(torch.ones(()))
    param.grad = torch.ones(2).half()
    optimizer.accumulate()
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.ones(())
    with pytest.raises(mpcore.StageError, match=r"accumulate\(\) has unscaled"):
        optimizer.step()


def test_a_closure_may_accumulate(engine: Engine) -> None:
    results = []
    for accumulates in (False, True):
        param = nn.Parameter(torch.ones(2).half())
        inner = torch.optim.SGD([param], lr=0.5, momentum=0.9)
        optimizer = engine.wrap(inner, mpcore.StaticLossScale(4.0))

        def closure(optimizer: Any = optimizer, param: Any = param, adds: Any = accumulates) -> Any:
            optimizer.zero_grad()
            loss = param.float().square().sum()
            optimizer.backward(loss)
            if adds:
                optimizer.accumulate()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(3)]
        results.append((losses, param.tolist(), optimizer.steps))
    assert results[0] == results[1]


@pytest.mark.parametrize("engine", FUSED, ids=str)
def test_large_parameters_are_added_in_slices(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[list[int]] = []

    class Spy(StepGradients):
        def __init__(self, params: Any, *rest: Any, **options: Any) -> None:
            sizes.append([param.numel() for param in params])
            super().__init__(params, *rest, **options)

    monkeypatch.setattr("mpcore.engine.accumulation._AT_ONCE", 10)
    monkeypatch.setattr("mpcore.engine.accumulation.StepGradients", Spy)
    params = [nn.Parameter(torch.zeros(n).half()) for n in (3, 8, 30, 0, 1)]
    optimizer = engine.wrap(torch.optim.SGD(params, lr=1.0), mpcore.StaticLossScale(4.0))
    for _ in range(3):
        optimizer.backward(sum(param.float().sum() for param in params))
        optimizer.accumulate()
    assert sizes == [[3, 8], [30], [0, 1]] * 3
    optimizer.step()
    assert all((param == -3.0).all() for param in params)


def test_a_gradient_in_memory_of_somebody_else_is_copied(engine: Engine) -> None:
    """DistributedDataParallel's buckets are written to by the next pass."""
    param, bucket = nn.Parameter(torch.zeros(2)), torch.zeros(2)
    optimizer = engine.wrap(torch.optim.SGD([param], lr=1.0), mpcore.StaticLossScale(8.0))
    for size in (1.0, 10.0, 100.0):
        bucket.zero_()
        param.grad = bucket
        optimizer.backward(param.sum() * size)
        assert param.grad is bucket
        optimizer.accumulate()
        assert bucket.tolist() == [8 * size] * 2
    optimizer.step()
    assert param.tolist() == [-111.0] * 2


def test_sums_are_gone_after_the_step(engine: Engine) -> None:
    params = [nn.Parameter(torch.zeros(2).half()), nn.Parameter(torch.zeros(2))]
    optimizer = engine.wrap(torch.optim.SGD(params, lr=1.0), mpcore.StaticLossScale(8.0))
    for number in (1, 2):  # without zero_grad()
        optimizer.backward(params[0].float().sum() + params[1].sum())
        optimizer.accumulate()
        optimizer.step()
        assert [param.grad for param in params] == [None, None]
        assert [param.tolist() for param in params] == [[-number] * 2] * 2


def test_the_result_of_a_step_keeps_no_sums_alive(engine: Engine) -> None:
    param = nn.Parameter(torch.zeros(100).half())
    optimizer = engine.wrap(torch.optim.SGD([param], lr=1.0), mpcore.StaticLossScale(8.0))
    optimizer.backward(param.float().sum())
    optimizer.accumulate()
    total = weakref.ref(optimizer._stage.accumulated.sums[param])
    optimizer.step()
    gc.collect()
    assert total() is None
    assert not optimizer.last_step.skipped


def test_a_sum_that_overflows_is_an_overflow_of_all_that_took_part(engine: Engine) -> None:
    param = nn.Parameter(torch.zeros(2, dtype=BRAIN))
    rule = mpcore.DynamicLossScale(init=2.0, growth_interval=1, min_scale=2.0**-10)
    for scale, expected in ((rule, 1.0), (mpcore.NoLossScale(), 1.0)):
        optimizer = engine.wrap(torch.optim.SGD([param], lr=1.0), scale)
        for _ in range(3):
            optimizer.backward((param.float() * 1.5e38).sum())
            optimizer.accumulate()
        optimizer.step()
        assert optimizer.last_step.skipped
        assert (optimizer.steps, optimizer.skipped_steps) == (1, 1)
        assert optimizer.loss_scale == expected
        optimizer.zero_grad()


def test_sums_that_are_edited_to_what_is_not_finite_skip(engine: Engine) -> None:
    param = nn.Parameter(torch.zeros(2).half())
    optimizer = engine.wrap(torch.optim.SGD([param], lr=1.0), mpcore.StaticLossScale(8.0))
    optimizer.backward(param.float().sum())
    optimizer.accumulate()
    optimizer.unscale_()
    optimizer.grads()[0][0] = torch.inf
    optimizer.step()
    assert optimizer.last_step.skipped


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_graph_of_gradients_is_left_alone(engine: Engine) -> None:
    param = nn.Parameter(torch.full((2,), 2.0))
    optimizer = engine.wrap(torch.optim.SGD([param], lr=1.0), mpcore.StaticLossScale(4.0))
    optimizer.backward(param.square().sum(), create_graph=True)
    penalty = param.grad.square().sum() / 16  # of the unscaled gradient
    optimizer.accumulate()
    optimizer.backward(penalty)
    optimizer.accumulate()
    optimizer.unscale_()
    assert optimizer.grads()[0].tolist() == [4.0 + 16.0] * 2


@pytest.mark.parametrize("way", ["unscale", "accumulate", "step"])
def test_a_float32_gradient_of_other_strides_is_not_permuted(engine: Engine, way: str) -> None:
    param = nn.Parameter(torch.zeros(3, 2))
    optimizer = engine.wrap(torch.optim.SGD([param], lr=1.0), mpcore.StaticLossScale(2.0))
    optimizer.scale(torch.zeros(()))
    param.grad = (torch.arange(6.0).reshape(2, 3) * 2).t()
    if way == "unscale":
        optimizer.unscale_()
    elif way == "accumulate":
        optimizer.accumulate()
    optimizer.step()
    assert param.tolist() == [[0.0, -3.0], [-1.0, -4.0], [-2.0, -5.0]]
