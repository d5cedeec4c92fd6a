"""The invariants of the design that concern scales and overflows: 5, 6 and 7."""

import math

import mpcore
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcore_testing.devices import FIRST, SECOND, SimulatedDevices
from mpcore_testing.engines import ENGINES, GENERAL
from mpcore_testing.loss_scales import dynamic_scales, expected_scales

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
INF = math.inf


@given(
    rule=dynamic_scales(),
    overflows=st.lists(st.booleans(), min_size=1, max_size=20),
    engine=st.sampled_from(ENGINES),
)
def test_invariant_5_the_scale_stays_a_power_of_two_within_its_bounds(rule, overflows, engine):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = engine.wrap(torch.optim.SGD([weight], lr=1.0), rule)
    course = []
    for overflow in overflows:
        before = optimizer.loss_scale
        optimizer.scale(torch.ones(()))
        weight.grad = torch.full((1,), INF if overflow else before)  # 1, scaled
        optimizer.step()
        assert optimizer.last_step.skipped == overflow
        course.append(optimizer.loss_scale)
        assert math.frexp(course[-1])[0] == 0.5
        assert rule.min_scale <= course[-1] <= rule.max_scale
    assert course == expected_scales(rule, overflows)
    assert weight.item() == -overflows.count(False)  # scaling and unscaling were exact
    assert optimizer.skipped_steps == overflows.count(True)


def overflows_by_hand(grad, scale):
    """Whether a gradient or, in float32, the gradient over the scale is not finite; by NumPy."""
    unscaled = (grad.double().numpy() / scale).astype(np.float32)
    return not np.isfinite(unscaled).all()


def step_over(engine, grad, scale, *, fused=False, max_norm=None, unscale=False):
    """Returns the optimizer and the weight after one step from a weight of 0 by SGD with lr=1."""
    weight = torch.nn.Parameter(torch.zeros_like(grad))
    optimizer = engine.wrap(
        torch.optim.SGD([weight], lr=1.0, fused=fused), mpcore.StaticLossScale(scale)
    )
    optimizer.scale(torch.ones(()))
    weight.grad = grad.clone()
    if unscale:
        optimizer.unscale_()
    if max_norm is not None:
        optimizer.clip_grad_norm_(max_norm)
    optimizer.step()
    return optimizer, weight


WAYS = [{}, {"max_norm": 1.0}, {"max_norm": 1e-30}, {"unscale": True, "max_norm": 1.0}]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("dtype", "value", "exponent", "overflow"),
    [
        (FULL, 1e37, -20, True),
        (FULL, 3.4e38, -1, True),
        (FULL, 3.4e38, 0, False),
        (BRAIN, 3.3e38, -1, True),
        (BRAIN, 3.3e38, 0, False),
        (HALF, 65504.0, -126, True),
        (HALF, 65504.0, -113, True),
        (HALF, 65504.0, -112, False),
        (HALF, 2.0**-24, -126, False),
    ],
)
def test_invariant_7_a_gradient_overflows_if_its_unscaled_value_does(
    engine, dtype, value, exponent, overflow, fused, way
):
    grad = torch.tensor([1.0, -value, 0.0]).to(dtype)
    assert torch.isfinite(grad).all()
    optimizer, weight = step_over(engine, grad, 2.0**exponent, fused=fused, **way)
    assert optimizer.last_step.skipped == overflow
    assert torch.isfinite(weight).all()
    assert bool(weight.any()) != overflow or "max_norm" in way


@given(
    dtype=st.sampled_from([HALF, BRAIN, FULL]),
    words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4),
    exponent=st.integers(-126, 126),
    way=st.sampled_from(WAYS),
    engine=st.sampled_from(ENGINES),
)
def test_invariant_7_skips_exactly_if_a_loaded_or_unscaled_value_is_not_finite(
    dtype, words, exponent, way, engine
):
    raw = torch.tensor(words, dtype=torch.int32)
    grad = raw.view(FULL) if dtype == FULL else (raw >> 16).to(torch.int16).view(dtype)
    overflow = overflows_by_hand(grad, 2.0**exponent)
    optimizer, weight = step_over(engine, grad, 2.0**exponent, **way)
    assert optimizer.last_step.skipped == overflow
    if overflow:
        assert not weight.any()
    elif not way:
        master = optimizer.state.get(weight, {}).get("master", weight).detach()
        expected = torch.from_numpy(-(grad.double().numpy() / 2.0**exponent).astype(np.float32))
        assert torch.equal(master, expected)


@pytest.mark.filterwarnings("ignore:each of the last")
def test_invariant_7_neither_the_scale_nor_its_reciprocal_is_ever_zero_or_infinite(engine):
    weight = torch.nn.Parameter(torch.zeros(2))
    rule = mpcore.DynamicLossScale(
        init=1.0, min_scale=2.0**-126, growth_interval=1, max_scale=2.0**126
    )
    optimizer = engine.wrap(torch.optim.SGD([weight], lr=1.0), rule)

    def step(value):
        optimizer.scale(torch.ones(()))
        weight.grad = torch.full((2,), value)
        optimizer.step()
        return optimizer.loss_scale

    assert min(step(INF) for _ in range(300)) == 2.0**-126
    step(2.0**-126)
    assert weight.tolist() == [-1.0, -1.0]
    assert max(step(0.0) for _ in range(300)) == 2.0**126
    step(2.0**126)
    assert weight.tolist() == [-2.0, -2.0]
    assert optimizer.skipped_steps == 300


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 255, 256, 257])
def test_invariant_6_any_number_of_overflows_is_one_overflow(engine, count, fused):
    """Flags that are added up reach 2, which is not 1, or 256, which is 0 in eight bits."""
    weights = [torch.nn.Parameter(torch.ones(1).half()) for _ in range(count + 1)]
    groups = [{"params": weights[:1]}, {"params": weights[1:]}]
    optimizer = engine.wrap(torch.optim.AdamW(groups, lr=0.5, fused=fused))
    optimizer.scale(torch.ones(()))
    for number, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, INF if number else 1.0)
    optimizer.step()
    assert optimizer.last_step.skipped
    assert len(optimizer.last_step.overflowed()) == count
    assert {weight.item() for weight in weights} == {1.0}
    assert (optimizer.skipped_steps, optimizer.loss_scale) == (1, 2.0**15)


@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0, 256.0])
@pytest.mark.parametrize("fused", [False, True])
def test_invariant_6_an_outside_scaler_may_say_so_with_any_number(engine, fused, found_inf):
    """torch.amp.GradScaler adds up the flags of its devices."""
    weight = torch.nn.Parameter(torch.ones(2).half())
    optimizer = engine.wrap(torch.optim.AdamW([weight], lr=0.5, fused=fused))
    weight.grad = torch.ones_like(weight)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found_inf)
    optimizer.step()
    assert optimizer.last_step.skipped == (found_inf != 0)
    assert (weight.tolist() == [1.0, 1.0]) == (found_inf != 0)
    assert optimizer.state[weight]["master"].isfinite().all()


class Gated(torch.optim.Optimizer):
    """Takes `found_inf`, as fused optimizers do, on parameters of any device."""

    _step_supports_amp_scaling = True

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                keep = self.found_inf.to(param.device) != 0
                param.copy_(torch.where(keep, param, param - group["lr"] * param.grad))


ANYWHERE = [engine for engine in ENGINES if engine.backend == "reference"]


@pytest.mark.parametrize(
    ("engine", "inner"),
    [*((engine, torch.optim.SGD) for engine in ANYWHERE), (GENERAL, Gated)],
    ids=["sync", "fused path", "found_inf"],
)
@pytest.mark.parametrize("home", [0, 1])
@pytest.mark.parametrize("spoilt", [0, 1, 2, 3])
def test_invariant_6_an_overflow_on_one_device_skips_the_step_on_every_device(
    engine, spoilt, home, inner
):
    with SimulatedDevices():
        devices = [FIRST, SECOND] if home == 0 else [SECOND, FIRST]
        params = [
            torch.nn.Parameter(torch.ones(2, dtype=dtype, device=device))
            for device in devices
            for dtype in (HALF, FULL)
        ]
        assert {p.device for p in params} == {FIRST, SECOND}
        optimizer = engine.wrap(inner(params, lr=1.0), mpcore.DynamicLossScale(init=4.0))
        for overflow in (True, False):
            optimizer.scale(torch.ones((), device=FIRST))
            for number, param in enumerate(params):
                value = INF if overflow and number == spoilt else 1.0
                param.grad = torch.full_like(param, value)
            scale = optimizer.loss_scale
            norm = float(optimizer.clip_grad_norm_(100.0))
            assert norm == (INF if overflow else pytest.approx(math.sqrt(8) / scale, rel=1e-7))
            optimizer.step()
            assert optimizer.last_step.skipped == overflow
            expected = [1.0, 1.0] if overflow else [0.5, 0.5]
            assert [param.values.tolist() for param in params] == [expected] * 4
        assert (optimizer.steps, optimizer.skipped_steps, optimizer.loss_scale) == (2, 1, 2.0)


@pytest.mark.parametrize("engine", ANYWHERE, ids=str)
def test_invariant_4_clamped_weights_are_counted_over_all_devices(engine):
    with SimulatedDevices():
        starts = [torch.full((3,), 65504.0, dtype=HALF, device=d) for d in (FIRST, SECOND)]
        params = [torch.nn.Parameter(start) for start in starts]
        optimizer = engine.wrap(torch.optim.SGD(params, lr=1e4), mpcore.StaticLossScale(1.0))
        optimizer.scale(torch.ones((), device=SECOND))
        for param in params:
            param.grad = torch.full_like(param, -1.0)
        optimizer.step()
        assert [param.values.tolist() for param in params] == [[65504.0] * 3] * 2
        assert optimizer.saturated == 6
