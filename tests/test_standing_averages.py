"""A `Monitor` warns once of an average in 16 bits that stands still, and of no other."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

STEPS = 160
#: so far that an average of 0.9995 is less than a thousand places behind, which rounds away
RATES = {torch.float16: 2.5e-3, torch.bfloat16: 2.5e-2}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        nn.init.ones_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def said(dtype: torch.dtype, make: Callable[[nn.Module, Any], Callable[[], None]]) -> list[str]:
    """What is warned of in a training, with something done after each step."""
    model = Net()
    inner = torch.optim.SGD(model.parameters(), lr=RATES[dtype])
    optimizer = mpcore.MixedPrecisionOptimizer(inner, mpcore.NoLossScale())
    mpcore.cast_model(model, dtype, optimizer)
    follow = make(model, optimizer)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with mpcore.Monitor(optimizer, model, every=20):
            for _ in range(STEPS):
                optimizer.backward(model.layer.weight.float().sum())
                optimizer.step()
                optimizer.zero_grad()
                follow()
    return [str(one.message) for one in found]


def torchs(decay: float, average: Any = swa_utils.AveragedModel) -> Callable[..., Any]:
    def make(model: nn.Module, optimizer: Any) -> Callable[[], None]:
        fn = swa_utils.get_ema_multi_avg_fn(decay)
        args = (model,) if average is swa_utils.AveragedModel else (model, optimizer)
        ema = average(*args, multi_avg_fn=fn)
        return lambda: ema.update_parameters(model)

    return make


def by_hand(decay: float, wide: bool = False) -> Callable[..., Any]:
    def make(model: nn.Module, optimizer: Any) -> Callable[[], None]:
        ema = copy.deepcopy(model).requires_grad_(False)
        shadow = [param.detach().float() for param in ema.parameters()]

        def update() -> None:
            for param, own, kept in zip(ema.parameters(), model.parameters(), shadow, strict=True):
                with torch.no_grad():
                    if wide:
                        param.copy_(kept.lerp_(own.float(), 1 - decay))
                    else:
                        param.mul_(decay).add_(own, alpha=1 - decay)

        return update

    return make


def frozen(model: nn.Module, optimizer: Any) -> Callable[[], None]:
    teacher = copy.deepcopy(model)
    return lambda: teacher.eval()


def target(model: nn.Module, optimizer: Any) -> Callable[[], None]:
    network = copy.deepcopy(model)

    def update() -> None:
        network.load_state_dict(model.state_dict())

    return update


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_average_that_stands_still_is_warned_of_once(dtype: torch.dtype) -> None:
    for make in (torchs(0.9995), torchs(0.9999)):
        (text,) = said(dtype, make)
        assert f"kept in {str(dtype)[6:]} and stands still" in text
        assert "mpcore.AveragedModel" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        torchs(0.9),
        torchs(0.9995, mpcore.AveragedModel),
        torchs(0.9999, mpcore.AveragedModel),
        by_hand(0.9995, wide=True),
        by_hand(0.9999, wide=True),
        by_hand(0.9),
        frozen,
        target,
    ],
)
def test_what_moves_or_is_no_average_is_not_warned_of(
    dtype: torch.dtype, make: Callable[..., Any]
) -> None:
    assert said(dtype, make) == []


def test_the_average_of_what_a_model_wraps_is_found() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = Wrapper(Net().half())
    optimizer = mpcore.MixedPrecisionOptimizer(
        torch.optim.SGD(model.parameters(), lr=2.5e-3), mpcore.NoLossScale()
    )
    ema = swa_utils.AveragedModel(model.module, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9995))
    mpcore.Monitor(optimizer, model, every=20)

    def train() -> None:
        for _ in range(STEPS):
            optimizer.backward(model.module.layer.weight.float().sum())
            optimizer.step()
            optimizer.zero_grad()
            ema.update_parameters(model.module)

    with pytest.warns(UserWarning, match="stands still"):
        train()


def test_a_loop_of_ones_own_is_seen_too() -> None:
    def make(model: nn.Module, optimizer: Any) -> Callable[[], None]:
        ema = copy.deepcopy(model).requires_grad_(False)

        def update() -> None:
            with torch.no_grad():
                for param, own in zip(ema.parameters(), model.parameters(), strict=True):
                    param.lerp_(own, 5e-4)

        return update

    assert len(said(torch.float16, make)) == 1


def test_another_model_that_is_trained_is_no_average() -> None:
    """Of the same class, with an optimizer of its own; and what is half made, or has no memory."""
    torch.manual_seed(1)
    pair = [nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)).bfloat16() for _ in range(2)]
    optimizers = [
        mpcore.MixedPrecisionOptimizer(
            torch.optim.SGD(model.parameters(), lr=1e-4), mpcore.NoLossScale()
        )
        for model in pair
    ]
    half_made = nn.Linear.__new__(nn.Linear)
    skeleton = copy.deepcopy(pair[0]).to("meta")
    with mpcore.Monitor(optimizers[0], pair[0], every=1):  # warnings are errors here
        for _ in range(40):
            for model, optimizer in zip(pair, optimizers, strict=True):
                optimizer.backward(model(torch.ones(2, 4).bfloat16()).float().square().mean())
                optimizer.step()
                optimizer.zero_grad()
    assert next(skeleton.parameters()).is_meta
    assert type(half_made) is nn.Linear
