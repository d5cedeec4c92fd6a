"""Tensors whose memory is replaced between two calls of a step: values stay, addresses do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.bits import rounded, same_bits
from mpcore_testing.engines import ENGINES, Engine
from mpcore_testing.snapshots import snapshot


def share(tensor: Tensor) -> None:
    """What a data loader's worker or Hogwild training does: the old memory is freed."""
    tensor.data.share_memory_()


def replace(tensor: Tensor) -> None:
    old = tensor.data
    tensor.data = old.clone()
    old.fill_(torch.nan)  # whoever still reads it shall be seen


def transpose(tensor: Tensor) -> None:
    """The same values, and another layout."""
    if tensor.dim() == 2:
        old = tensor.data
        tensor.data = old.t().clone(memory_format=torch.contiguous_format).t()
        old.fill_(torch.nan)


def gradients(optimizer: Any) -> list[Tensor]:
    return [param.grad for group in optimizer.param_groups for param in group["params"]]


def parameters(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def masters(optimizer: Any) -> list[Tensor]:
    return [state["master"] for state in optimizer.state.values()]


def moments(optimizer: Any) -> list[Tensor]:
    return [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


def run(engine: Engine, change: Callable[[Any], None], when: str) -> Any:
    """Three steps; in the second and third something is moved."""
    values = torch.linspace(-2, 2, 20).view(4, 5)
    params = [nn.Parameter(values.half()), nn.Parameter(values[0].bfloat16())]
    optimizer = engine.wrap(torch.optim.Adam(params, lr=0.01), mpcore.NoLossScale())
    for number in range(3):
        for param in params:
            grad = (torch.arange(param.numel()).view(param.shape) - number).to(param.dtype)
            param.grad = grad * 2.0**-6
        if number and when == "before the clip":
            change(optimizer)
        optimizer.clip_grad_norm_(0.5)
        if number and when == "after the clip":
            change(optimizer)
        optimizer.step()
    return snapshot(optimizer)


@pytest.mark.parametrize("when", ["before the clip", "after the clip"])
@pytest.mark.parametrize("way", [share, replace, transpose])
@pytest.mark.parametrize("which", [gradients, parameters, masters, moments])
def test_memory_that_moves_is_followed(
    engine: Engine, which: Callable[[Any], list[Tensor]], way: Callable[[Tensor], None], when: str
) -> None:
    def change(optimizer: Any) -> None:
        for tensor in which(optimizer):
            way(tensor)

    assert same_bits(run(engine, change, when), run(engine, lambda _: None, when))


def turned(grad: Tensor) -> Tensor:
    return grad.t()


def as_bfloat16(grad: Tensor) -> Tensor:
    return grad.view(torch.bfloat16)


@pytest.mark.parametrize("view", [turned, as_bfloat16])
def test_a_gradient_seen_through_another_view_after_a_clip_is_what_it_says(
    engine: Engine, view: Callable[[Tensor], Tensor]
) -> None:
    def train(copy: Callable[[Tensor], Tensor]) -> Any:
        param = nn.Parameter(torch.linspace(-2, 2, 16).view(4, 4).half())
        optimizer = engine.wrap(torch.optim.Adam([param], lr=0.01), mpcore.NoLossScale())
        for number in range(3):
            param.grad = (torch.arange(16).view(4, 4) - number).half() * 2.0**-6
            optimizer.clip_grad_norm_(0.5)
            param.grad.data = copy(view(param.grad.data))
            optimizer.step()
        return snapshot(optimizer)

    assert same_bits(train(lambda grad: grad), train(Tensor.clone))


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("size", [4, 32])
def test_a_master_whose_data_got_another_size_is_refused_and_nothing_changes(
    engine: Engine, size: int, clips: bool
) -> None:
    param = nn.Parameter(torch.linspace(-2, 2, 16).half())
    optimizer = engine.wrap(torch.optim.SGD([param], lr=0.01), mpcore.NoLossScale())
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    master = optimizer.state[param]["master"]
    values, before = master.data, snapshot(optimizer)
    master.data = torch.zeros(size)
    with pytest.raises(mpcore.ArgumentError, match=rf"expected \[{size}\] like its master, got \["):
        optimizer.clip_grad_norm_(1.0) if clips else optimizer.step()
    master.data = values
    assert same_bits(snapshot(optimizer), before)
    optimizer.step()


def test_a_parameter_that_is_cut_where_it_lies_is_stepped_in_its_new_size(engine: Engine) -> None:
    memory = torch.zeros(16)
    param = nn.Parameter(memory)
    optimizer = engine.wrap(torch.optim.SGD([param], lr=0.5), mpcore.NoLossScale())
    for number in range(4):
        if number == 3:
            param.data = memory[:8]
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert memory.tolist() == [-2.0] * 8 + [-1.5] * 8


def test_a_parameter_that_is_seen_in_another_format_is_rounded_to_that(engine: Engine) -> None:
    param = nn.Parameter(torch.linspace(-2, 2, 16).half())
    optimizer = engine.wrap(torch.optim.SGD([param], lr=0.5), mpcore.NoLossScale())
    for number in range(4):
        if number == 3:
            param.grad = None
            param.data = param.data.view(torch.bfloat16)
        param.grad = torch.full_like(param, 2.0**-10)
        optimizer.step()
    master = optimizer.state[param]["master"]
    assert same_bits(param.detach(), rounded(master.detach(), torch.bfloat16))
    assert master[0] == -2 - 4 * 2.0**-11


def make(engine: Engine) -> Any:
    param = nn.Parameter(torch.linspace(-2, 2, 16).half())
    optimizer = engine.wrap(torch.optim.Adam([param], lr=0.01), mpcore.NoLossScale())
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    return optimizer


@contextmanager
def freed(tensor: Tensor) -> Iterator[None]:
    """Within this a tensor has no memory; afterwards it has its values again."""
    storage, values = tensor.untyped_storage(), tensor.detach().clone()
    storage.resize_(0)
    yield
    storage.resize_(values.nbytes)
    tensor.data.copy_(values)


@pytest.mark.parametrize("which", [gradients, parameters])
def test_memory_that_was_freed_is_an_error_and_nothing_changes(
    engine: Engine, which: Callable[[Any], list[Tensor]]
) -> None:
    optimizer = make(engine)
    before = snapshot(optimizer)
    if which is gradients:
        optimizer.clip_grad_norm_(1.0)
    with (
        freed(which(optimizer)[0]),
        pytest.raises(mpcore.ArgumentError, match="its memory was freed"),
    ):
        optimizer.step()
    assert same_bits(snapshot(optimizer), before)
    optimizer.step()


@pytest.mark.parametrize("which", [parameters, masters, moments])
def test_kernels_are_not_handed_memory_that_was_freed_after_a_clip(
    which: Callable[[Any], list[Tensor]],
) -> None:
    optimizer = make(next(e for e in ENGINES if e.fused and e.backend == "compiled"))
    optimizer.clip_grad_norm_(1.0)
    with (
        freed(which(optimizer)[0]),
        pytest.raises(mpcore.ArgumentError, match="expected memory of their own"),
    ):
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_parameter_that_got_gaps_is_stepped_where_it_lies(
    engine: Engine, dtype: torch.dtype
) -> None:
    param = nn.Parameter(torch.ones(4, 4).to(dtype))
    inner = torch.optim.SGD([param], lr=0.5)
    path = "auto" if engine.fused else "general"
    optimizer = mpcore.MixedPrecisionOptimizer(
        inner, mpcore.NoLossScale(), backend=engine.backend, path=path
    )
    for number in range(4):
        if number == 3:
            param.data = param.data.repeat_interleave(2, dim=1)[:, ::2]
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert param.tolist() == [[-1.0] * 4] * 4
