"""Buffers of a cast model: what it writes itself counts and averages as in FP32."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from mpcore import cast_model, cast_report
from torch import Tensor, nn

from mpcore_testing.writers import ONES, Inner, Update

HALF = [torch.float16, torch.bfloat16]


class Outer(nn.Module):
    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.parts = nn.ModuleDict({"q": Inner(*args)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.parts["q"](x) + self.stem(x)
        return y


def rebind(change: Callable[[Tensor, Tensor], Tensor]) -> Update:
    def update(module: nn.Module, x: Tensor) -> None:
        module.zorp = change(module.zorp, x)

    return update


def index(module: nn.Module, x: Tensor) -> None:
    module.zorp[torch.tensor([0, 2])] += 0.001 * x[0, :2]


def put(module: nn.Module, x: Tensor) -> None:
    where = (torch.arange(4),)
    module.zorp.index_put_(where, 0.001 * x.mean(0), accumulate=True)


def foreach(module: nn.Module, x: Tensor) -> None:
    torch._foreach_mul_([module.zorp], 0.999)
    torch._foreach_add_([module.zorp], [0.001 * x.mean(0)])


UPDATES: dict[str, tuple[Tensor, Update]] = {
    "mul_": (ONES, lambda m, x: m.zorp.mul_(0.999)),
    "mul_ and add_": (ONES, lambda m, x: m.zorp.mul_(0.999).add_(x.mean(0), alpha=0.001)),
    "lerp_": (ONES, lambda m, x: m.zorp.lerp_(x.mean(0), 0.001)),
    "copy_": (ONES, lambda m, x: m.zorp.copy_(0.999 * m.zorp + 0.001 * x.mean(0))),
    "data": (ONES, lambda m, x: m.zorp.data.mul_(0.999)),
    "data copy_": (ONES, lambda m, x: m.zorp.data.copy_(m.zorp.data * 0.999)),
    "detach": (ONES, lambda m, x: m.zorp.detach().mul_(0.999)),
    "a view": (ONES, lambda m, x: m.zorp.view(2, 2).mul_(0.999)),
    "augmented": (ONES, lambda m, x: m.zorp.__imul__(0.999)),
    "setitem": (ONES, index),
    "index_put_": (ONES, put),
    "index_add_": (ONES, lambda m, x: m.zorp.index_add_(0, torch.arange(4), 0.001 * x.mean(0))),
    "addcmul_": (ONES, lambda m, x: m.zorp.addcmul_(x.mean(0), x.mean(0), value=0.001)),
    "fill_": (ONES, lambda m, x: m.zorp.fill_(m.zorp[0] * 0.999)),
    "set by slices": (ONES, lambda m, x: m.zorp.__setitem__(slice(None), m.zorp * 0.999)),
    "out=": (ONES, lambda m, x: torch.mul(m.zorp, 0.999, out=m.zorp)),
    "foreach": (ONES, foreach),
    "rebound": (ONES, rebind(lambda b, x: 0.999 * b + 0.001 * x.mean(0))),
    "rebound lerp": (ONES, rebind(lambda b, x: torch.lerp(b, x.mean(0), 0.001))),
    "counter": (torch.full((4,), 2040.0), lambda m, x: m.zorp.add_(1)),
    "0-d counter": (torch.tensor(2040.0), lambda m, x: m.zorp.add_(1)),
    "1-element counter": (torch.tensor([2040.0]), lambda m, x: m.zorp.add_(1)),
    "rebound counter": (torch.tensor([2040.0]), rebind(lambda b, x: b + 1)),
    "0-d average": (torch.ones(()), lambda m, x: m.zorp.lerp_(x.abs().amax(), 0.001)),
    "0-d rebound": (torch.ones(()), rebind(lambda b, x: 0.999 * b + 0.001 * x.abs().amax())),
    "1-element average": (torch.ones(1), rebind(lambda b, x: 0.999 * b + 0.001 * x.mean())),
    "running maximum": (torch.zeros(()), rebind(lambda b, x: torch.maximum(0.999 * b, x.amax()))),
    "2-d": (torch.ones(3, 4), lambda m, x: m.zorp.mul_(0.999).add_(x[:3], alpha=0.001)),
}


@pytest.mark.filterwarnings("ignore:cast_model. the forward pass writes")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", UPDATES)
def test_what_a_forward_pass_writes_moves_as_in_fp32(name: str, dtype: torch.dtype) -> None:
    """60 passes; exactly as in FP32 where only numbers are added."""
    torch.manual_seed(0)
    first, update = UPDATES[name]
    plain = Outer(first, update, name != "data")
    model = cast_model(copy.deepcopy(plain), dtype)
    x = torch.randn(8, 4).to(dtype).float()  # so that the inputs are the same
    for _ in range(60):
        model(x)
        plain(x)
    ours, theirs = model.parts["q"].zorp, plain.parts["q"].zorp
    assert ours.dtype == torch.float32
    assert type(ours) is Tensor
    assert not torch.equal(theirs, first)
    # statistics of a batch are 16-bit, and the first pass of a rebound buffer is
    assert (ours - theirs).abs().max() <= 2 * torch.finfo(dtype).eps * theirs.abs().max()
    if "counter" in name:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_pass_that_widens_a_buffer_loses_nothing_and_says_so_once(dtype: torch.dtype) -> None:
    first = torch.tensor([1000.5, 1.001, 0.1, 2049.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is rounded
        model = cast_model(Inner(first, lambda m, x: m.zorp.data.add_(1), True), dtype)
    assert model.zorp.dtype == dtype
    with pytest.warns(UserWarning, match=r"writes to zorp.*keep_fp32=\['zorp'\]") as told:
        model(torch.ones(2, 4))
    assert len(told) == 1
    assert torch.equal(model.zorp, first + 1)
    model(torch.ones(2, 4))
    assert torch.equal(model.zorp, first + 2)
    assert "written by the forward pass" in str(cast_report(model))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_buffer_that_is_bound_anew_is_fp32_after_the_first_pass(dtype: torch.dtype) -> None:
    seen = []

    def update(module: nn.Module, x: Tensor) -> None:
        seen.append(x.mean(0))
        module.zorp = seen[-1]

    model = cast_model(Inner(ONES, update, True), dtype)
    with pytest.warns(UserWarning, match="writes to zorp"):
        model(torch.ones(2, 4))
    assert model.zorp.dtype == torch.float32
    assert seen[0].dtype == dtype  # which may be somebody else's
    model(torch.ones(2, 4))
    assert model.zorp.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_a_write_in_a_later_pass_is_noticed_too(training: bool) -> None:
    def update(module: nn.Module, x: Tensor) -> None:
        if x.sum() > 0:
            module.zorp.add_(1)

    model = cast_model(Inner(torch.full((4,), 7.0), update, True), torch.bfloat16).train(training)
    for _ in range(3):
        model(-torch.ones(2, 4))
    assert model.zorp.dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="writes to zorp"):
        model(torch.ones(2, 4))
    assert model.zorp.tolist() == [8.0] * 4
    assert model.zorp.dtype == torch.float32


def test_a_buffer_that_training_alone_writes_is_noticed_after_evaluation() -> None:
    def update(module: nn.Module, x: Tensor) -> None:
        if module.training:
            module.zorp.data.mul_(0.999)

    model = cast_model(Inner(ONES, update, True), torch.bfloat16).eval()
    model(torch.ones(2, 4))
    model.train()
    with pytest.warns(UserWarning, match="writes to zorp"):
        model(torch.ones(2, 4))
    assert torch.equal(model.zorp, ONES * 0.999)


def test_a_checkpoint_loaded_before_the_first_pass_is_where_it_goes_on() -> None:
    model = cast_model(Inner(ONES, lambda m, x: m.zorp.add_(1), True), torch.bfloat16)
    model.load_state_dict(model.state_dict() | {"zorp": torch.full((4,), 8.0)})
    with pytest.warns(UserWarning, match="writes to zorp"):
        model(torch.ones(2, 4))
    assert model.zorp.tolist() == [9.0] * 4


@pytest.mark.parametrize("back", ["trace", "half"])
def test_a_16_bit_buffer_that_somebody_puts_back_is_widened_again(back: str) -> None:
    model = cast_model(Inner(ONES, lambda m, x: m.zorp.data.mul_(0.999), True), torch.bfloat16)
    if back == "trace":
        with pytest.warns(UserWarning, match="writes to zorp"):
            mpcore.trace_overflow(model, torch.ones(2, 4), lambda result: result.sum())
    else:
        with pytest.warns(UserWarning, match="writes to zorp"):
            model(torch.ones(2, 4))
        model.zorp.fill_(1)
        model.to(torch.bfloat16)
    assert model.zorp.dtype == torch.bfloat16
    model(torch.ones(2, 4))
    assert torch.equal(model.zorp, ONES * 0.999)


def test_random_numbers_of_a_written_buffer_are_drawn_once() -> None:
    torch.manual_seed(0)
    plain = Inner(torch.ones(64), lambda m, x: m.zorp.normal_(), True)
    model = cast_model(copy.deepcopy(plain), torch.float16)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="writes to zorp"):
        model(torch.ones(2, 4))
    ours, after = model.zorp.clone(), torch.rand(1)
    torch.manual_seed(1)
    torch.ones(64).half().normal_()
    assert torch.equal(after, torch.rand(1))
    assert ours.std() > 0.5
