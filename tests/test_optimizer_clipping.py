"""`unscale_`, `grads` and `clip_grad_norm_` in every order, against torch and NumPy."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import mpcore
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.engines import ENGINES, Engine

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SCALE = 2.0**8
LR = 0.5


def make(
    engine: Engine, dtypes: Any = DTYPES, size: int = 40, seed: int = 0, scale: Any = None
) -> tuple[list[nn.Parameter], mpcore.MixedPrecisionOptimizer]:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.zeros(size).to(dtype)) for dtype in dtypes]
    inner = torch.optim.SGD(params, lr=LR)
    optimizer = engine.wrap(inner, scale or mpcore.StaticLossScale(SCALE))
    optimizer.scale(torch.ones(()))
    for param in params:
        param.grad = (torch.randn(size, generator=generator) * SCALE).to(param.dtype)
    return params, optimizer


def unscaled(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.grad.float() / SCALE for param in params]


def updates(optimizer: Any, params: list[nn.Parameter]) -> list[Tensor]:
    """What was subtracted from weights that began at zero, exactly."""
    return [-optimizer.state.get(p, {}).get("master", p.detach()) / LR for p in params]


def coefficient_of(grads: list[Tensor], max_norm: float) -> np.float32:
    """min(1, max_norm / (norm + 1e-6)) in NumPy's float64, rounded once to float32."""
    norm = np.sqrt(sum(np.square(grad.double().numpy()).sum() for grad in grads))
    return np.float32(min(1.0, max_norm / (norm + 1e-6)))


def possible_factors(engine: Engine, grads: list[Tensor], max_norm: float) -> list[np.float32]:
    """Every float32 that a norm within its stated error may lead to.

    The reference backend's sum of squares is right to 3 * 2^-24, so its norm to half of that and
    two roundings; the cpu backend states 1e-6.
    """
    exact = coefficient_of(grads, max_norm)
    if exact == 1:
        return [exact]
    around = [exact, exact]
    while np.nextafter(around[-1], np.float32(1)) <= np.float32(1) and len(around) < 20:
        around += [np.nextafter(around[-1], np.float32(1))]
    while len(around) < 40:
        around = [np.nextafter(around[0], np.float32(0)), *around]
    allowed = 1e-6 if engine.backend == "cpu" else 3.5 * 2.0**-24
    return [f for f in around if abs(float(f) / float(exact) - 1) <= allowed]


def clip_first(optimizer: Any, max_norm: float) -> None:
    optimizer.clip_grad_norm_(max_norm)


def unscale_first(optimizer: Any, max_norm: float) -> None:
    optimizer.unscale_()
    optimizer.clip_grad_norm_(max_norm)


def clip_then_unscale(optimizer: Any, max_norm: float) -> None:
    optimizer.clip_grad_norm_(max_norm)
    optimizer.unscale_()


def unscale_read_clip_read(optimizer: Any, max_norm: float) -> None:
    optimizer.unscale_()
    optimizer.grads()
    optimizer.clip_grad_norm_(max_norm)
    optimizer.grads()


ORDERS = [clip_first, unscale_first, clip_then_unscale, unscale_read_clip_read]


@pytest.mark.parametrize("max_norm", [1e-30, 0.1, 1.0, 7.3, 1e30, float("inf")])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_updates_by_the_gradient_times_one_rounded_coefficient(
    engine: Engine, order: Any, max_norm: float
) -> None:
    params, optimizer = make(engine)
    grads = unscaled(params)
    factors = possible_factors(engine, grads, max_norm)
    order(optimizer, max_norm)
    optimizer.step()
    got, before = (torch.cat(tensors) for tensors in (updates(optimizer, params), grads))
    assert any(torch.equal(got, torch.from_numpy(before.numpy() * f)) for f in factors)


@pytest.mark.parametrize("max_norm", [1e-30, 0.1, 1.0, 7.3, 1e3])
@pytest.mark.parametrize("order", ORDERS)
def test_clipping_agrees_with_torch_on_float32_copies(
    engine: Engine, order: Any, max_norm: float
) -> None:
    params, optimizer = make(engine)
    copies = [nn.Parameter(torch.zeros(40)) for _ in params]
    for copy, grad in zip(copies, unscaled(params), strict=True):
        copy.grad = grad
    norm = torch.nn.utils.clip_grad_norm_(copies, max_norm)
    order(optimizer, max_norm)
    optimizer.step()
    # torch's norm, sum and quotient are rounded to float32 each, a few units of 2^-24
    assert optimizer.last_step.grad_norm == pytest.approx(norm.item(), rel=5e-7)
    for update, copy in zip(updates(optimizer, params), copies, strict=True):
        if max_norm > norm:
            assert torch.equal(update, copy.grad)
        torch.testing.assert_close(update, copy.grad, rtol=5e-7, atol=0.0)


# float32 dot products round the norm of the cpu backend otherwise than torch does
@pytest.mark.parametrize("engine", [e for e in ENGINES if e.backend == "reference"], ids=str)
def test_clipping_equals_torch_bit_for_bit_where_the_coefficients_are_equal(engine: Engine) -> None:
    compared = 0
    for seed in range(30):
        params, optimizer = make(engine, seed=seed)
        copies = [nn.Parameter(torch.zeros(40)) for _ in params]
        for copy, grad in zip(copies, unscaled(params), strict=True):
            copy.grad = grad.clone()
        norm = torch.nn.utils.get_total_norm([copy.grad for copy in copies])
        theirs = (1.0 / (norm + 1e-6)).clamp(max=1.0).item()
        if theirs != coefficient_of(unscaled(params), 1.0):
            continue
        compared += 1
        torch.nn.utils.clip_grad_norm_(copies, 1.0)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        for update, copy in zip(updates(optimizer, params), copies, strict=True):
            assert torch.equal(update, copy.grad)
    assert compared > 5


@pytest.mark.parametrize("apply", [False, True])
def test_a_second_clip_sees_what_the_first_one_left(engine: Engine, apply: bool) -> None:
    for first, second in itertools.product((0.5, 2.0, 1e6), repeat=2):
        params, optimizer = make(engine)
        copies = [nn.Parameter(torch.zeros(40)) for _ in params]
        for copy, grad in zip(copies, unscaled(params), strict=True):
            copy.grad = grad
        if apply:
            optimizer.unscale_()
        for max_norm in (first, second):
            mine = optimizer.clip_grad_norm_(max_norm)
            theirs = torch.nn.utils.clip_grad_norm_(copies, max_norm)
            assert mine.dtype == torch.float32
            assert mine.shape == ()
            assert mine.item() == pytest.approx(theirs.item(), rel=1e-6)  # as above, twice
        optimizer.step()
        for update, copy in zip(updates(optimizer, params), copies, strict=True):
            torch.testing.assert_close(update, copy.grad, rtol=1e-6, atol=0.0)


def test_clipping_writes_no_gradient(engine: Engine) -> None:
    params, optimizer = make(engine)
    before = [param.grad.clone() for param in params]
    optimizer.clip_grad_norm_(1e-3)
    assert all(torch.equal(p.grad, old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize(("dtype", "huge"), [(torch.bfloat16, 2.0**127), (torch.float32, 1e38)])
def test_a_norm_whose_square_overflows_float32_still_clips(
    engine: Engine, dtype: torch.dtype, huge: float
) -> None:
    params, optimizer = make(engine, [dtype], size=4, scale=mpcore.NoLossScale())
    params[0].grad = torch.full((4,), huge).to(dtype)
    huge = params[0].grad[0].double().item()
    assert optimizer.clip_grad_norm_(1.0).item() == np.float32(2 * huge)
    optimizer.step()
    assert not optimizer.last_step.skipped
    expected = np.float32(huge) * np.float32(1.0 / (2 * huge + 1e-6))
    assert updates(optimizer, params)[0].tolist() == [pytest.approx(expected, rel=1e-6)] * 4


def test_gradients_too_small_for_16_bits_count_in_the_norm_and_reach_the_master(
    engine: Engine,
) -> None:
    param = nn.Parameter(torch.zeros(4).half())
    inner = torch.optim.SGD([param], lr=LR)
    optimizer = engine.wrap(inner, mpcore.StaticLossScale(2.0**16))
    optimizer.backward((param.float() * 2.0**-27).sum())
    assert optimizer.clip_grad_norm_(1.0).item() == 2.0**-26
    optimizer.step()
    assert updates(optimizer, [param])[0].tolist() == [2.0**-27] * 4


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("order", ORDERS)
def test_a_non_finite_norm_skips_and_blames_only_its_parameter(
    engine: Engine, order: Any, bad: float
) -> None:
    params, optimizer = make(engine)
    params[1].grad[3] = bad
    order(optimizer, 1.0)
    optimizer.step()
    assert optimizer.last_step.skipped
    assert not np.isfinite(optimizer.last_step.grad_norm)
    assert all(not param.any() for param in params)
    assert optimizer.last_step.overflowed() == ["group 0, parameter 1, [40]"]


@pytest.mark.parametrize(
    ("engine", "dtype"), [(e, d) for e in ENGINES for d in e.dtypes([*DTYPES, torch.float64])]
)
def test_a_zero_gradient_has_norm_zero_and_changes_nothing(
    engine: Engine, dtype: torch.dtype
) -> None:
    params, optimizer = make(engine, [dtype])
    params[0].grad.zero_()
    assert optimizer.clip_grad_norm_(1.0) == 0.0
    optimizer.step()
    assert not optimizer.last_step.skipped
    assert not params[0].any()


def test_grads_are_float32_in_parameter_order_and_editing_them_changes_the_step(
    engine: Engine,
) -> None:
    middle = engine.dtypes([torch.float64, torch.float32])[0]
    dtypes = [torch.float32, torch.float16, middle, torch.bfloat16]
    params, optimizer = make(engine, dtypes)
    params[0].grad = None
    own, scaled = params[1].grad, params[1].grad.clone()
    expected = [param.grad.double().numpy() / SCALE for param in params[1:]]
    optimizer.unscale_()
    grads = optimizer.grads()
    assert [grad.dtype for grad in grads] == [torch.float32, middle, torch.float32]
    assert all(np.array_equal(g.numpy(), e) for g, e in zip(grads, expected, strict=True))
    assert all(g is p.grad for g, p in zip(grads, params[1:], strict=True))
    grads[0].mul_(0.5)
    optimizer.grads()[2].zero_()
    optimizer.step()
    assert params[1].grad is own
    assert torch.equal(own, scaled)
    assert torch.equal(updates(optimizer, params[1:2])[0], grads[0])
    assert np.array_equal(grads[0].numpy(), expected[0] * 0.5)
    assert not updates(optimizer, params[3:])[0].any()
    assert not params[0].any()


def test_an_overflow_stays_one_whatever_is_written_over_it(engine: Engine) -> None:
    params, optimizer = make(engine, [torch.float32])
    params[0].grad[0] = torch.inf
    optimizer.unscale_()
    optimizer.grads()[0].zero_()
    optimizer.step()
    assert optimizer.last_step.skipped


def test_a_step_without_gradients_leaves_no_result_of_an_older_one(engine: Engine) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = engine.wrap(torch.optim.SGD([weight], lr=1.0))
    optimizer.backward(weight.sum())
    optimizer.step()
    assert optimizer.last_step is not None
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.last_step is None


def test_grads_without_any_gradient_is_an_empty_list(engine: Engine) -> None:
    params, optimizer = make(engine)
    for param in params:
        param.grad = None
    optimizer.unscale_()
    assert optimizer.grads() == []


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize(
    ("way", "number"),
    # sums of 16-bit parameters are nowhere to be written to
    [*itertools.product(["write", "replace", "pass"], [0, 1, 2]), ("sums", 2)],
)
def test_what_is_not_finite_after_a_clip_reaches_no_master(
    engine: Engine, value: float, way: str, number: int
) -> None:
    """Nothing is shown after a clip, but whoever writes to a gradient can."""
    params, optimizer = make(engine)
    before = [param.detach().clone() for param in params]
    if way == "sums":
        optimizer.accumulate()
    optimizer.clip_grad_norm_(1.0)
    grad: Any = params[number].grad
    if way == "replace":
        params[number].grad = torch.full_like(grad, value)
    elif way == "pass":  # of a loss that did not go through the optimizer
        (params[number].float() * value).sum().backward()
    else:
        grad[3] = value
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.skipped
    assert optimizer.last_step.overflowed() == [f"group 0, parameter {number}, [40]"]
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_an_overflow_that_a_clip_has_seen_stays_one_when_its_gradient_is_replaced(
    engine: Engine,
) -> None:
    params, optimizer = make(engine)
    params[0].grad[3] = torch.inf  # type: ignore[index]
    optimizer.clip_grad_norm_(1.0)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.skipped


@pytest.mark.parametrize("sums", [False, True])
def test_gradients_that_were_clipped_do_not_outlive_their_step(engine: Engine, sums: bool) -> None:
    params, optimizer = make(engine)
    grads = [weakref.ref(param.grad) for param in params]
    if sums:
        optimizer.accumulate()
        grads += [weakref.ref(total) for total in optimizer._stage.accumulated.sums.values()]
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert [grad() for grad in grads] == [None] * len(grads)
    assert optimizer.last_step is not None  # whose norm and flags can be read still
    assert optimizer.last_step.grad_norm is not None
