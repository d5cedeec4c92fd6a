"""Training that goes on in another place than where it was saved: path, layout, device."""

from __future__ import annotations

import copy
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.bits import same_bits
from mpcore_testing.devices import FIRST, SimulatedDevices
from mpcore_testing.engines import Engine
from mpcore_testing.snapshots import snapshot

SCALE = mpcore.DynamicLossScale(2.0**8, growth_interval=2)
INNERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD without momentum": lambda p: torch.optim.SGD(p, lr=0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Lion": lambda p: mpcore.optim.Lion(p, lr=0.01),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, 24).view(2, 3, 2, 2).to(d)) for d in DTYPES]


def train(params: Any, optimizer: Any, seeds: Any) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        scale = optimizer.loss_scale
        optimizer.scale(torch.ones((), device=params[0].device))
        for number, param in enumerate(params):
            noise = torch.randn(param.shape, generator=generator) * scale
            if seed % 4 == 2 and number == 1:
                noise.view(-1)[0] = torch.inf
            grad = torch.empty_like(param)
            param.grad = grad.copy_(noise.to(param.dtype).to(param.device))
        optimizer.step()
        optimizer.zero_grad()


def auto(name: str, params: Any, backend: str, path: str = "auto") -> Any:
    return mpcore.MixedPrecisionOptimizer(INNERS[name](params), SCALE, backend=backend, path=path)


def moved_to(params: Any, saved: Any) -> None:
    with torch.no_grad():
        for param, weight in zip(params, saved, strict=True):
            param.copy_(weight)


@pytest.mark.parametrize("backend", ["cpu", "compiled"])
@pytest.mark.parametrize("first", ["fused", "general"])
@pytest.mark.parametrize("name", INNERS)
def test_a_run_may_go_on_on_the_other_path(name: str, first: str, backend: str) -> None:
    """As if a run that was never saved had changed its path there: a step hook makes it do so."""
    params = weights()
    straight = auto(name, params, backend)
    hook = None
    if first == "general":
        hook = straight.inner.register_step_post_hook(lambda *_: None)
    assert {path.path for path in straight.path} == {first}
    train(params, straight, range(5))
    others = weights()
    resumed = auto(name, others, backend, "general" if first == "fused" else "fused")
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    moved_to(others, params)
    if hook is None:
        straight.inner.register_step_post_hook(lambda *_: None)
    else:
        hook.remove()
    assert {path.path for path in straight.path} != {first}
    train(params, straight, range(5, 10))
    train(others, resumed, range(5, 10))
    assert same_bits(snapshot(resumed), snapshot(straight))
    assert resumed.state_dict()["mpcore"] == straight.state_dict()["mpcore"]


@pytest.mark.parametrize("name", INNERS)
def test_a_run_may_go_on_in_another_memory_layout(engine: Engine, name: str) -> None:
    params = weights()
    straight = engine.wrap(INNERS[name](params), SCALE)
    train(params, straight, range(5))
    others = [nn.Parameter(p.detach().to(memory_format=torch.channels_last)) for p in weights()]
    resumed = engine.wrap(INNERS[name](others), SCALE)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    moved_to(others, params)
    train(params, straight, range(5, 10))
    train(others, resumed, range(5, 10))
    for param, other in zip(params, others, strict=True):
        assert other.stride() != param.stride()
        assert torch.equal(other, param)
        one, two = straight.state[param], resumed.state[other]
        assert one.keys() == two.keys()
        assert all(same_bits(one[k], two[k].contiguous()) for k in one if k != "step")


@pytest.mark.parametrize("name", INNERS)
def test_a_model_may_change_its_memory_layout_in_mid_training(engine: Engine, name: str) -> None:
    runs = []
    for changes in (False, True):
        params = weights()
        optimizer = engine.wrap(INNERS[name](params), SCALE)
        train(params, optimizer, range(5))
        if changes:  # what Module.to(memory_format=...) does
            for param in params:
                param.data = param.data.to(memory_format=torch.channels_last)
        train(params, optimizer, range(5, 10))
        runs.append((params, optimizer))
    (params, straight), (others, changed) = runs
    for param, other in zip(params, others, strict=True):
        assert other.stride() != param.stride()
        assert torch.equal(other, param)
        one, two = straight.state[param], changed.state[other]
        assert all(same_bits(one[k], two[k].contiguous()) for k in one if k != "step")


def values_of(tensor: Any) -> Tensor:
    return tensor.values if hasattr(tensor, "values") and not callable(tensor.values) else tensor


@pytest.mark.parametrize("path", ["general", "fused"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_run_saved_on_a_cpu_may_go_on_on_a_device(name: str, path: str) -> None:
    engine = Engine("reference", path)
    params = weights()
    straight = engine.wrap(INNERS[name](params), SCALE)
    train(params, straight, range(5))
    saved = copy.deepcopy(straight.state_dict())
    with SimulatedDevices():
        others = [nn.Parameter(p.detach().to(FIRST)) for p in params]
        resumed = engine.wrap(INNERS[name](others), SCALE)
        resumed.load_state_dict(saved)
        for param in others:
            state = resumed.state[param]
            assert {v.device for k, v in state.items() if k != "step"} == {FIRST}
        train(params, straight, range(5, 10))
        train(others, resumed, range(5, 10))
        for param, other in zip(params, others, strict=True):
            assert same_bits(values_of(other.detach()), param.detach())
            for key, value in straight.state[param].items():
                assert same_bits(values_of(resumed.state[other][key]).float(), value.float())
