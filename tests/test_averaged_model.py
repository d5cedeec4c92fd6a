"""`mpcore.AveragedModel`: averages of masters, beside float64, torch's own, and a resumed one."""

from __future__ import annotations

import copy
import types
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
    wide = average.float32_state_dict()["norm.running_mean"]
    for shown in (average.module.norm.running_mean, wide):
        assert shown.double().sub(expected).abs().max() < 1e-6
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


def test_statistics_of_update_bn_are_exported_and_put_in() -> None:
    model, optimizer, step = training(torch.float16)
    model.register_buffer("offset", torch.ones(1).half())
    average = mpcore.AveragedModel(model, optimizer)
    step()
    average.update_parameters(model)
    inputs = torch.randn(64, 4) * 3 + 5
    seen: list[Tensor] = []
    average.module.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    swa_utils.update_bn([inputs], average)
    average.module.offset.fill_(3)
    expected = seen[0].double().mean(0)
    wide = average.float32_state_dict()
    assert (wide["offset"].item(), wide["offset"].dtype) == (3, torch.float32)
    assert (wide["norm.running_mean"].double() - expected).abs().max() < 0.02
    assert int(wide["norm.num_batches_tracked"]) == 1
    before = copy.deepcopy(model.state_dict())
    with average.applied_to(model):
        assert same_bits(dict(model.state_dict()), dict(average.module.state_dict()))
    assert same_bits(dict(model.state_dict()), dict(before))
    average.update_parameters(model)
    assert torch.equal(average.module.norm.running_mean, model.norm.running_mean)


class Around(nn.Module):
    """Has a child called `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.head = nn.Linear(2, 2), nn.Linear(2, 1)


class Tied(nn.Module):
    """One weight, and one buffer, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.out.weight = self.inside.weight
        for part in (self.inside, self.out):
            part.register_buffer("mask", torch.ones(3) if part is self.inside else self.inside.mask)


class Extra(nn.Linear):
    """State that is no parameter, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.extra: Any = torch.ones(2).half()
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "data parallel": lambda: nn.DataParallel(nn.Linear(2, 2)),
    "a child called module": Around,
    "module in module": lambda: nn.DataParallel(Around()),
    "tied": Tied,
    "extra state": lambda: nn.Sequential(Extra(), nn.BatchNorm1d(2)),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_strict_load_gets_the_averages_under_all_names(shape: str) -> None:
    model = SHAPES[shape]()
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = mpcore.MixedPrecisionOptimizer(inner, mpcore.NoLossScale())
    mpcore.cast_model(model, torch.bfloat16, optimizer)
    average = mpcore.AveragedModel(model, optimizer)
    totals = [torch.zeros(param.shape, dtype=torch.float64) for param in model.parameters()]
    for _ in range(2):
        optimizer.backward(sum(param.float().sum() for param in model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        for total, param in zip(totals, model.parameters(), strict=True):
            total += master_of(optimizer, param) / 2
    wide = average.float32_state_dict()
    assert list(wide) == list(model.state_dict())
    fresh = SHAPES[shape]()
    fresh.load_state_dict(wide)
    for param, total in zip(fresh.parameters(), totals, strict=True):
        assert param.dtype == torch.float32
        assert (param.double() - total).abs().max() < 1e-6
    if isinstance(fresh, nn.Sequential):
        assert fresh[0].extra.dtype == torch.float16, "extra state is the model's own affair"


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


def test_weights_that_no_given_optimizer_steps_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
    first, second = (
        mpcore.MixedPrecisionOptimizer(torch.optim.SGD(part.parameters(), lr=1e-4))
        for part in model
    )
    with pytest.raises(mpcore.ArgumentError, match=r"got '0\.weight' \(torch\.float16\) in none"):
        mpcore.AveragedModel(model, second)
    with pytest.raises(mpcore.ArgumentError, match=r"got '1\.weight'"):
        mpcore.AveragedModel(model, [first])
    mpcore.AveragedModel(model, [first, second])
    model[1].float()  # needs no master
    mpcore.AveragedModel(model, first)
    model[1].half().requires_grad_(False)
    mpcore.AveragedModel(model, first)


def test_a_copy_of_the_average_alone_does_not_average_rounded_weights() -> None:
    model, optimizer, step = training(torch.bfloat16)
    average = mpcore.AveragedModel(model, optimizer)
    step()
    average.update_parameters(model)
    alone = copy.deepcopy(average)
    step()
    before = copy.deepcopy(alone.state_dict())
    with pytest.raises(mpcore.ArgumentError, match="copy model, optimizer and average in one"):
        alone.update_parameters(model)
    assert same_bits(dict(alone.state_dict()), dict(before))
    assert same_bits(dict(alone.float32_state_dict()), dict(average.float32_state_dict()))
    other = mpcore.AveragedModel(model, optimizer)  # what the message says
    other.load_state_dict(alone.state_dict())
    for each in (average, other):
        each.update_parameters(model)
    assert same_bits(dict(other.state_dict()), dict(average.state_dict()))


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
        mpcore.AveragedModel(model, types.SimpleNamespace(state={}))  # type: ignore[arg-type]
    with pytest.raises(mpcore.ArgumentTypeError, match="optimizer: expected"):
        mpcore.AveragedModel(model, [swa_utils.get_ema_avg_fn()])  # type: ignore[list-item]
    with pytest.raises(mpcore.ArgumentError, match="at most one"):
        mpcore.AveragedModel(
            model, torch.optim.SGD(model.parameters()), avg_fn=max, multi_avg_fn=max
        )
