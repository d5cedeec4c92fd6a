"""What happens around a fused step: first overflows, edits, new tensors, state that was there."""

from __future__ import annotations

import copy
from typing import Any

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import FUSED, Engine

SCALE = mpcore.StaticLossScale(2.0**8)
NAMES = {
    "Adam": (torch.optim.Adam, {"amsgrad": True}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "AdamW": (torch.optim.AdamW, {}, {"exp_avg", "exp_avg_sq"}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}, {"momentum_buffer"}),
    "Adagrad": (torch.optim.Adagrad, {}, {"sum"}),
    "Lion": (mpcore.optim.Lion, {"weight_decay": 0.1}, {"exp_avg"}),
}
pytestmark = pytest.mark.parametrize("engine", FUSED, ids=str)


def weights() -> list[nn.Parameter]:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return [nn.Parameter(torch.linspace(-1, 2, 6).reshape(2, 3).to(dtype)) for dtype in dtypes]


def give(optimizer: Any, params: list[Any], seed: int, skip: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = float(optimizer.scale(torch.ones(())))
    for number, param in enumerate(params):
        grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)
        param.grad = None if number in skip else grad


def step(optimizer: Any, params: list[Any], seed: int, skip: tuple[int, ...] = ()) -> None:
    give(optimizer, params, seed, skip)
    optimizer.step()


def masters(optimizer: Any, params: list[Any]) -> list[Any]:
    return [optimizer.state.get(p, {}).get("master", p).detach().clone() for p in params]


@pytest.mark.parametrize("name", NAMES)
def test_state_has_torchs_names_in_float32_and_counts_only_steps_that_were_taken(
    name: str, engine: Engine
) -> None:
    kind, options, expected = NAMES[name]
    params, others = weights(), weights()
    optimizer = engine.wrap(kind(params, lr=0.01, **options), SCALE)
    clean = engine.wrap(kind(others, lr=0.01, **options), SCALE)
    for bad in range(3):  # the very first ones overflow, each for another reason
        give(optimizer, params, 0)
        params[bad].grad[0, bad] = (torch.inf, torch.nan, -torch.inf)[bad]
        optimizer.step()
        assert optimizer.last_step.skipped
        assert same_bits([p.detach() for p in params], [p.detach() for p in weights()])
    # one joins late: its bias correction and first velocity are its own
    for number in range(4):
        step(optimizer, params, number, skip=(1,) if number < 2 else ())
        step(clean, others, number, skip=(1,) if number < 2 else ())
    assert same_bits(masters(optimizer, params), masters(clean, others))
    for number, (param, other) in enumerate(zip(params, others, strict=True)):
        state = dict(optimizer.state[param])
        assert same_bits(state, dict(clean.state[other]))
        state.pop("master", None)
        count = state.pop("step", None)
        assert set(state) == expected
        assert all(value.dtype == torch.float32 for value in state.values())
        if name == "Lion":
            assert count is None
        else:
            assert (count.dtype, count.shape) == (torch.float32, ())
            assert count == (2 if number == 1 else 4)


@pytest.mark.parametrize("name", NAMES)
def test_edited_gradients_reach_the_step_as_they_are(name: str, engine: Engine) -> None:
    """Halved after unscaling, or halved before: exact, so the same bits."""
    kind, options, _ = NAMES[name]
    params, others = weights(), weights()
    optimizer = engine.wrap(kind(params, lr=0.01, **options), SCALE)
    other = engine.wrap(kind(others, lr=0.01, **options), SCALE)
    for number in range(3):
        give(optimizer, params, number)
        optimizer.unscale_()
        for grad in optimizer.grads():
            grad.mul_(0.5)
        optimizer.step()
        give(other, others, number)
        for param in others:
            param.grad.mul_(0.5)
        other.step()
    assert same_bits(masters(optimizer, params), masters(other, others))


@pytest.mark.parametrize("when", ["before the clip", "after the clip"])
@pytest.mark.parametrize("tensor", [False, True])
def test_options_changed_between_clip_and_step_count(
    when: str, tensor: bool, engine: Engine
) -> None:
    """What a clip has prepared is for the numbers of then."""
    params, others = weights(), weights()

    def build(given: Any, lr: float) -> torch.optim.Optimizer:
        rate = torch.tensor(lr) if tensor else lr
        return torch.optim.AdamW(given, lr=rate, weight_decay=0.5)

    optimizer = engine.wrap(build(params, 1.0), SCALE)
    other = engine.wrap(build(others, 0.25), SCALE)
    group = optimizer.param_groups[0]
    give(optimizer, params, 0)
    give(other, others, 0)
    other.clip_grad_norm_(0.5)
    if when == "after the clip":
        optimizer.clip_grad_norm_(0.5)
    if tensor:
        group["lr"].fill_(0.25)
    else:
        group["lr"] = 0.25
    if when == "before the clip":
        optimizer.clip_grad_norm_(0.5)
    optimizer.step()
    other.step()
    assert same_bits(masters(optimizer, params), masters(other, others))


def test_a_tensor_put_in_the_place_of_a_parameters_is_the_one_that_is_written(
    engine: Engine,
) -> None:
    params, others = weights(), weights()
    optimizer, other = (
        engine.wrap(torch.optim.AdamW(given, lr=0.1), SCALE) for given in (params, others)
    )
    olds = []
    for number in range(3):
        step(optimizer, params, number)
        step(other, others, number)
        olds.append([p.detach() for p in params])
        before = copy.deepcopy(olds[-1])
        for param in params:
            param.data = param.data.clone()
        step(optimizer, params, 10 + number)
        step(other, others, 10 + number)
        assert same_bits(olds[-1], before), "a plan wrote to a tensor that was replaced"
    assert same_bits([p.detach() for p in params], [p.detach() for p in others])
    assert same_bits(masters(optimizer, params), masters(other, others))


@pytest.mark.parametrize("kind", ["transposed", "expanded", "strided", "channels last"])
def test_gradients_of_other_strides_than_their_parameter_are_read_by_value(
    kind: str, engine: Engine
) -> None:
    for dtype in (torch.float16, torch.float32):
        shape = (2, 3, 4, 4)
        param, other = (nn.Parameter(torch.linspace(-1, 1, 96).view(shape).to(dtype)) for _ in "ab")
        if kind == "channels last":
            param = nn.Parameter(param.detach().to(memory_format=torch.channels_last))
        optimizer, plain = (
            engine.wrap(torch.optim.AdamW([p], lr=0.1), SCALE) for p in (param, other)
        )
        for number in range(3):
            give(plain, [other], number)
            optimizer.scale(torch.ones(()))
            grad = other.grad.clone()
            if kind == "transposed":
                grad = grad.transpose(0, 3).contiguous().transpose(0, 3)
            elif kind == "expanded":
                grad = grad[:1].expand(shape)
                other.grad = grad.clone()
            elif kind == "strided":
                grad = torch.stack([grad, grad], dim=-1)[..., 0]
            param.grad = grad
            optimizer.step()
            plain.step()
        assert torch.equal(masters(optimizer, [param])[0], masters(plain, [other])[0])
        assert torch.equal(param, other)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_state_of_an_optimizer_wrapped_after_ten_plain_steps_is_adopted(
    name: str, engine: Engine
) -> None:
    kind, options, _ = NAMES[name]
    params, others = ([nn.Parameter(p.detach().float()) for p in weights()] for _ in "ab")
    inner, plain = (kind(given, lr=0.01, **options) for given in (params, others))
    for number in range(10):
        for one, given in ((inner, params), (plain, others)):
            for param in given:
                param.grad = torch.cos(torch.arange(6.0) + number).reshape(2, 3)
            one.step()
    optimizer = engine.wrap(inner, mpcore.NoLossScale())
    for number in range(5):
        for one, given in ((optimizer, params), (plain, others)):
            for param in given:
                param.grad = torch.sin(torch.arange(6.0) + number).reshape(2, 3)
            one.step()
    for param, other in zip(params, others, strict=True):
        assert engine.agree(param, other, steps=5, lr=0.1)
        if name != "SGD":
            assert optimizer.state[param]["step"] == 15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_decay_too_small_for_16_bits_is_not_lost(dtype: torch.dtype, engine: Engine) -> None:
    """1 - 2^-14 is 1 in both formats; after 2^10 steps the weight has lost a sixteenth."""
    param = nn.Parameter(torch.ones(3).to(dtype))
    optimizer = engine.wrap(torch.optim.AdamW([param], lr=2.0**-7, weight_decay=2.0**-7), SCALE)
    for _ in range(1024):
        optimizer.scale(torch.ones(()))
        param.grad = torch.zeros_like(param)
        optimizer.step()
    expected = (1 - 2.0**-14) ** 1024
    # a product, rounded once, in each step
    assert (
        masters(optimizer, [param])[0].tolist()
        == [pytest.approx(expected, rel=1024 * 2.0**-24)] * 3
    )
    assert same_bits(param.detach(), torch.full((3,), expected).to(dtype))


def test_a_velocity_of_the_general_path_survives_if_the_first_fused_step_overflowed(
    engine: Engine,
) -> None:
    param, other = (nn.Parameter(torch.ones(3)) for _ in "ab")
    optimizer = mpcore.MixedPrecisionOptimizer(
        torch.optim.SGD([param], lr=0.1, momentum=0.9, dampening=0.5), SCALE, backend="cpu"
    )
    plain = torch.optim.SGD([other], lr=0.1, momentum=0.9, dampening=0.5)
    give(optimizer, [param], 0)
    param.grad[0] = torch.inf
    optimizer.step()
    handle = optimizer.inner.register_step_post_hook(lambda *_: None)
    for number in range(4):
        if number == 2:
            handle.remove()
        give(optimizer, [param], number)
        other.grad = param.grad / 2.0**8
        optimizer.step()
        plain.step()
    assert engine.agree(param, other, steps=4)
