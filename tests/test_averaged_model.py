"""`mpcore.AveragedModel`: averages of masters, beside float64, torch's own, and a resumed one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from mpcore_testing.bits import same_bits

FORMATS = [torch.float16, torch.bfloat16]
DECAY = 0.9995


class Net(nn.Module):
    """Weights near 1 that go down by 1/1000 a step, in 16 bits behind casts of the input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 1, bias=False)
        for weight in (self.first.weight, self.last.weight):
            nn.init.ones_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def training(dtype: torch.dtype) -> tuple[Net, mpcore.MixedPrecisionOptimizer, Callable[[], None]]:
    model = Net()
    inner = torch.optim.SGD(model.parameters(), lr=1e-2)
    optimizer = mpcore.MixedPrecisionOptimizer(inner, mpcore.NoLossScale())
    mpcore.cast_model(model, dtype, optimizer)
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with torch.no_grad():
            model(inputs)  # the statistics of the norm
        loss = sum(param.float().sum() for param in model.parameters()) * 0.1
        optimizer.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def master_of(optimizer: mpcore.MixedPrecisionOptimizer, param: Tensor) -> Tensor:
    master: Tensor = optimizer.state.get(param, {}).get("master", param)
    return master.detach().double()


AVERAGES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "ema": ({"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY)}, lambda n: 1 - DECAY),
    "ema, one by one": ({"avg_fn": swa_utils.get_ema_avg_fn(DECAY)}, lambda n: 1 - DECAY),
    "swa": ({}, lambda n: 1 / (n + 1)),
    "swa, several": ({"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()}, lambda n: 1 / (n + 1)),
    "own": ({"avg_fn": lambda old, new, n: old + (new - old) / 512}, lambda n: 1 / 512),
}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_is_that_of_the_masters(kind: str, dtype: torch.dtype) -> None:
    settings, share = AVERAGES[kind]
    model, optimizer, step = training(dtype)
    average = mpcore.AveragedModel(model, optimizer, **settings)
    torchs = swa_utils.AveragedModel(model, **settings) if kind == "ema" else None
    truth: list[Tensor] = []
    for n in range(100):
        step()
        average.update_parameters(model)
        if torchs is not None:
            torchs.update_parameters(model)
        now = [master_of(optimizer, param) for param in model.parameters()]
        truth = [a.lerp(b, share(n)) for a, b in zip(truth, now, strict=True)] if truth else now
    wide = average.float32_state_dict()
    for (name, param), expected in zip(model.named_parameters(), truth, strict=True):
        assert wide[name].dtype == torch.float32
        assert (wide[name].double() - expected).abs().max() < 1e-5  # 100 roundings of 2^-25
        shown = dict(average.module.named_parameters())[name]
        assert shown.dtype == param.dtype
        assert torch.equal(shown, wide[name].to(param.dtype))
    if torchs is not None:  # which stands still
        first = torchs.module.first.weight.detach()
        assert (first.double() - truth[0]).abs().max() > 1e-3
    assert int(average.n_averaged) == 100


@pytest.mark.parametrize("use_buffers", [False, True])
def test_buffers_are_the_models_last_or_averaged(use_buffers: bool) -> None:
    model, optimizer, step = training(torch.float16)
    average = mpcore.AveragedModel(model, optimizer, use_buffers=use_buffers)
    means = []
    for _ in range(4):
        step()
        average.update_parameters(model)
        assert model.norm.running_mean is not None
        means.append(model.norm.running_mean.double())
    expected = torch.stack(means).mean(0) if use_buffers else means[-1]
    assert average.module.norm.running_mean.double().sub(expected).abs().max() < 1e-6
    assert set(average.float32_state_dict()) == set(model.state_dict())


def test_the_average_runs_as_the_model_does() -> None:
    model, optimizer, step = training(torch.float16)
    average = mpcore.AveragedModel(model, optimizer)
    step()
    average.update_parameters(model)
    model.eval()
    average.eval()
    inputs = torch.randn(3, 4)
    assert torch.equal(average(inputs), model(inputs))
    wide = Net().eval()
    wide.load_state_dict(average.float32_state_dict())
    assert (wide(inputs) - model(inputs)).abs().max() < 0.02
    swa_utils.update_bn([inputs, inputs + 1], average)
    assert not torch.equal(average.module.norm.running_mean, model.norm.running_mean)


def test_a_loaded_or_copied_average_goes_on_with_the_same_bits() -> None:
    model, optimizer, step = training(torch.bfloat16)
    fn = swa_utils.get_ema_multi_avg_fn(DECAY)
    average = mpcore.AveragedModel(model, optimizer, multi_avg_fn=fn)
    for _ in range(3):
        step()
        average.update_parameters(model)
    loaded = mpcore.AveragedModel(model, optimizer, multi_avg_fn=fn)
    loaded.load_state_dict(average.state_dict())
    for _ in range(3):
        step()
        average.update_parameters(model)
        loaded.update_parameters(model)
    assert same_bits(loaded.state_dict(), average.state_dict())
    together = copy.deepcopy((model, optimizer, average))
    assert same_bits(together[2].state_dict(), average.state_dict())
    together[2].update_parameters(together[0])  # its optimizer is the copy
    average.update_parameters(model)
    assert same_bits(together[2].state_dict(), average.state_dict())


def test_an_average_is_put_in_and_out_and_masters_lose_nothing() -> None:
    model, optimizer, step = training(torch.float16)
    twin, _, twin_step = training(torch.float16)
    average = mpcore.AveragedModel(model, optimizer)
    for _ in range(5):
        step()
        twin_step()
        average.update_parameters(model)
        before = copy.deepcopy(model.state_dict())
        with average.applied_to(model):
            assert torch.equal(model.last.weight, average.module.last.weight)
        assert same_bits(dict(model.state_dict()), dict(before))
        with pytest.raises(KeyError), average.applied_to(model):
            raise KeyError
    assert same_bits(dict(model.state_dict()), dict(twin.state_dict()))
    twin_step()
    step()
    assert same_bits(dict(model.state_dict()), dict(twin.state_dict()))


def test_several_optimizers_and_weights_without_masters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
    optimizers = [
        mpcore.MixedPrecisionOptimizer(torch.optim.SGD(part.parameters(), lr=1e-4))
        for part in model
    ]
    average = mpcore.AveragedModel(model, optimizers)
    average.update_parameters(model)  # before there are masters
    assert torch.equal(average.module[0].weight, model[0].weight)
    for optimizer, part in zip(optimizers, model, strict=True):
        optimizer.backward(part.weight.float().sum() + part.bias.float().sum())
        optimizer.step()
    single = mpcore.AveragedModel(model, optimizers)
    single.update_parameters(model)
    for optimizer, part in zip(optimizers, model, strict=True):
        wide = dict(zip(dict(part.named_parameters()), part.parameters(), strict=True))
        for name, param in wide.items():
            at = next(n for n, p in model.named_parameters() if p is param)
            assert torch.equal(single.float32_state_dict()[at], optimizer.state[param]["master"])
            assert name in at


def test_large_averages_saturate_and_masks_stay() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    model.half()
    optimizer.adopt_masters([(model.weight, torch.full((1, 1), 7e4))])
    average = mpcore.AveragedModel(model, optimizer)
    average.update_parameters(model)
    assert average.module.weight.item() == 65504
    assert average.module.mask.tolist() == [0.0, -torch.inf]


def test_what_cannot_be_averaged_is_refused() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(mpcore.ArgumentTypeError, match=r"model: expected a torch\.nn"):
        mpcore.AveragedModel([model], torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(mpcore.ArgumentTypeError, match="optimizer: expected"):
        mpcore.AveragedModel(model, 3)  # type: ignore[arg-type]
    with pytest.raises(mpcore.ArgumentTypeError, match="optimizer: expected"):
        mpcore.AveragedModel(model, [swa_utils.get_ema_avg_fn()])  # type: ignore[list-item]
    with pytest.raises(mpcore.ArgumentError, match="at most one"):
        mpcore.AveragedModel(
            model, torch.optim.SGD(model.parameters()), avg_fn=max, multi_avg_fn=max
        )
