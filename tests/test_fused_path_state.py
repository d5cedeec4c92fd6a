"""State that comes from elsewhere, learning rates on a device, and host syncs of a fused step."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any
from unittest.mock import patch

import mpcore
import pytest
import torch
from mpcore.masters.step_plan import DevicePlan
from mpcore.updates import Hyper
from mpcore.updates.adam import AdamRule
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.devices import FIRST, SECOND, SimulatedDevices
from mpcore_testing.engines import FUSED, Engine
from mpcore_testing.syncs import HostSyncError, fake_cuda, steps_without_values

SCALE = mpcore.StaticLossScale(2.0**8)
ORACLE = Engine("reference", "fused")
engines = pytest.mark.parametrize("engine", FUSED, ids=str)


def weights() -> list[nn.Parameter]:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return [nn.Parameter(torch.linspace(-1, 2, 6).to(dtype)) for dtype in dtypes]


def train(optimizer: Any, params: list[Any], seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        scale = float(optimizer.scale(torch.ones(())))
        for param in params:
            param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)
        optimizer.step()
        optimizer.zero_grad()


@engines
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, mpcore.optim.Lion])
def test_state_loaded_in_mid_training_is_what_the_next_step_uses(kind: Any, engine: Engine) -> None:
    params = weights()
    optimizer = engine.wrap(kind(params, lr=0.01), SCALE)
    train(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    train(optimizer, params, range(3, 6))
    expected = copy.deepcopy([dict(optimizer.state[p]) for p in params])
    train(optimizer, params, range(6, 9))
    optimizer.load_state_dict(saved)
    with torch.no_grad():  # in place: every address stays
        for param, value in zip(params, values, strict=True):
            param.copy_(value)
    train(optimizer, params, range(3, 6))
    assert same_bits([dict(optimizer.state[p]) for p in params], expected)


@engines
def test_moments_of_other_strides_or_none_are_brought_into_the_layout_of_the_parameter(
    engine: Engine,
) -> None:
    turned = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3).t())
    plain = nn.Parameter(turned.detach().contiguous())
    optimizers = []
    for param in (turned, plain):
        inner = torch.optim.SGD([param], lr=0.1, momentum=0.9)
        inner.state[param] = {"momentum_buffer": torch.arange(6.0).view(3, 2)}
        optimizers.append(engine.wrap(inner, SCALE))
        train(optimizers[-1], [param], range(3))
    assert torch.equal(turned, plain)
    assert optimizers[0].state[turned]["momentum_buffer"].stride() == turned.stride()
    param, other = (nn.Parameter(torch.ones(3)) for _ in "ab")
    inner = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    inner.state[param] = {"momentum_buffer": None}  # as older releases of torch left it
    for one, given in ((inner, param), (torch.optim.SGD([other], lr=0.1, momentum=0.9), other)):
        train(engine.wrap(one, SCALE), [given], range(3))
    assert same_bits(param.detach(), other.detach())


@pytest.mark.parametrize("place", [FIRST, SECOND])  # of another device's a copy is made
def test_a_learning_rate_on_a_device_that_changes_after_the_clip_is_seen(place: Any) -> None:
    with SimulatedDevices():
        results = []
        for late in (False, True):
            weight = nn.Parameter(torch.ones(3, device=FIRST))
            rate = torch.full((), 1.0 if late else 0.25, device=place)
            optimizer = ORACLE.wrap(torch.optim.SGD([weight], lr=rate), SCALE)
            optimizer.scale(torch.ones((), device=FIRST))
            weight.grad = torch.full_like(weight, 2.0**8)
            optimizer.clip_grad_norm_(100.0)
            if late:
                rate.fill_(0.25)
            optimizer.step()
            results.append(weight.values.tolist())  # type: ignore[attr-defined]
        assert results[0] == results[1] == [0.75] * 3


def test_what_a_plan_is_prepared_for_lives_until_it_is_used() -> None:
    rate = torch.full((), 0.25)
    alive = weakref.ref(rate)
    part = DevicePlan(torch.device("cpu"), [], None, AdamRule(), [])
    part.note_prepared(Hyper(((0.0,),), (rate,)))
    del rate
    assert alive() is not None  # or another tensor could get its id, and be taken for it
    part.used()
    assert alive() is None


# addresses of fake tensors say nothing; here they only tell whether a plan is still good
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("way", ["step", "clip", "unscale"])
@pytest.mark.parametrize("tensor_lr", [False, True])
# not Adagrad: its constructor makes step counts on the host, which move to the device once
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, mpcore.optim.Lion])
def test_a_fused_step_never_asks_the_device(kind: Any, tensor_lr: bool, way: str) -> None:
    with fake_cuda() as watch:
        dtypes = (torch.float16, torch.bfloat16, torch.float32)
        params = [nn.Parameter(torch.empty(4, 3, dtype=d, device="cuda")) for d in dtypes]
        inner = kind([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
        for group in inner.param_groups:
            if tensor_lr:  # torch's constructors would read it
                group["lr"] = torch.full((), 0.1, device="cuda")
            group["momentum"] = 0.9
        optimizer = ORACLE.wrap(inner)
        steps_without_values(optimizer, params, way, drops_one=True)
        assert watch.operations > 100
        assert watch.reads == 0
        with pytest.raises((HostSyncError, RuntimeError)):
            bool(optimizer.last_step.skipped)


@engines
@pytest.mark.parametrize("name", ["master", "exp_avg", "exp_avg_sq"])
def test_a_tensor_of_the_state_that_is_given_other_memory_is_followed(
    engine: Engine, name: str
) -> None:
    results = []
    for moves in (False, True):
        params = weights()[:1]
        optimizer = engine.wrap(torch.optim.AdamW(params, lr=0.01), SCALE)
        train(optimizer, params, range(2))
        tensor = optimizer.state[params[0]][name]
        if moves:
            tensor.data = tensor.data * 2
        else:
            tensor.mul_(2)
        train(optimizer, params, range(2, 4))
        results.append([params[0].detach(), dict(optimizer.state[params[0]])])
    assert same_bits(results[0], results[1])


def test_a_state_that_is_replaced_or_cleared_is_what_the_next_step_uses(engine: Engine) -> None:
    results = []
    for change in ("none", "replace", "clear"):
        param = nn.Parameter(torch.zeros(2))
        inner = torch.optim.SGD([param], lr=1.0, momentum=0.5)
        optimizer = engine.wrap(inner, mpcore.NoLossScale())
        param.grad = torch.ones(2)
        optimizer.step()
        if change == "replace":
            optimizer.state[param]["momentum_buffer"] = torch.zeros(2)
        elif change == "clear":
            inner.state.clear()
        param.grad = torch.ones(2)
        optimizer.step()
        results.append(param.tolist())
    assert results == [[-2.5] * 2, [-2.0] * 2, [-2.0] * 2]


def test_memory_that_moves_between_clip_and_step_is_followed(engine: Engine) -> None:
    param = nn.Parameter(torch.zeros(2).half())
    optimizer = engine.wrap(torch.optim.SGD([param], lr=1.0), mpcore.NoLossScale())
    param.grad = torch.ones(2).half()
    optimizer.clip_grad_norm_(100.0)
    param.data = param.data.clone()
    optimizer.step()
    assert param.tolist() == [-1.0, -1.0]


@engines
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("way", ["load", "clear"])
def test_a_state_that_was_replaced_does_not_outlive_the_next_step(
    engine: Engine, way: str, clips: bool
) -> None:
    param = nn.Parameter(torch.linspace(-1, 1, 6).half())
    optimizer = engine.wrap(torch.optim.AdamW([param], lr=0.1), SCALE)
    train(optimizer, [param], range(3))
    state = optimizer.state[param]
    names = ("master", "exp_avg", "exp_avg_sq") if way == "load" else ("exp_avg", "exp_avg_sq")
    old = [weakref.ref(state[name]) for name in names]
    del state
    if way == "load":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        optimizer.state.clear()
    optimizer.scale(torch.ones(()))
    param.grad = torch.ones_like(param)
    if clips:
        optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    gc.collect()
    assert [tensor() for tensor in old] == [None] * len(old)


@pytest.mark.parametrize("closes", [False, True])
def test_gradients_of_a_step_that_failed_go_when_they_are_cleared(
    engine: Engine, closes: bool
) -> None:
    param = nn.Parameter(torch.linspace(-1, 1, 6).half())
    optimizer = engine.wrap(torch.optim.AdamW([param], lr=0.1), SCALE)

    def closure() -> None:
        optimizer.scale(torch.ones(()))
        param.grad = torch.ones_like(param)

    if not closes:
        closure()
    with (
        patch.object(optimizer._module, "update_", side_effect=MemoryError),
        patch.object(optimizer._module, "unscale_into", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        optimizer.step(closure if closes else None)
    grad = weakref.ref(param.grad)
    param.grad = None
    gc.collect()
    assert grad() is None
