"""FP32 buffers of a cast model in passes of other kinds: checkpointed, failed, sparse, cached."""

from __future__ import annotations

import copy
from typing import Any

import mpcore
import pytest
import torch
from mpcore import cast_model, cast_report
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpcore_testing.writers import ONES, Inner

HALF = [torch.float16, torch.bfloat16]


class Turned(nn.Module):
    """Attention with a code and an average of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("blorb", 10000 ** (-torch.arange(0, 8, 2) / 8))
        self.register_buffer("widest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        cos = torch.outer(torch.arange(x.shape[-2]), self.blorb).repeat(1, 2).cos()
        q, k, v = self.qkv(x).chunk(3, -1)
        with torch.no_grad():
            self.widest.lerp_(q.abs().amax(), 0.01)
        return (q * cos @ (k * cos).transpose(-1, -2)).softmax(-1) @ v  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("called", ["module", "function"])
def test_a_checkpointed_function_runs_once_more_in_the_backward_pass(
    called: str, reentrant: bool, dtype: torch.dtype
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.turned = nn.Linear(8, 8), Turned()
            self.way = called

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if self.way == "plain":
                return self.turned(x)  # type: ignore[no-any-return]
            run = self.turned if self.way == "module" else self.turned.forward
            return checkpoint(run, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = cast_model(Model(), dtype)
    other = copy.deepcopy(model)
    other.way = "plain"
    x = torch.randn(2, 5, 8)
    for each in (model, other):
        each(x).float().square().sum().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert {type(buffer) for buffer in model.buffers()} == {Tensor}


def test_a_backward_pass_that_raises_leaves_plain_buffers_after_the_next() -> None:
    model = cast_model(Turned(), torch.bfloat16)
    x = torch.randn(2, 5, 8, requires_grad=True)

    def fail(grad: Tensor) -> None:
        raise KeyError("no")

    handle = x.register_hook(fail)
    with pytest.raises(KeyError):
        model(x).float().sum().backward()
    handle.remove()
    model(x).float().sum().backward()
    assert {type(buffer) for buffer in model.buffers()} == {Tensor}


def test_an_input_that_is_a_result_gathers_no_hooks() -> None:
    class Echo(Turned):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    model = cast_model(Echo(), torch.float16)
    x = torch.randn(2, 5, 8).half().requires_grad_()
    for _ in range(3):
        model(x)
    assert not x._backward_hooks


def test_what_inference_mode_widens_can_be_trained_on() -> None:
    model = cast_model(Inner(ONES, lambda m, x: m.zorp.add_(1), True), torch.bfloat16)
    with torch.inference_mode(), pytest.warns(UserWarning, match="writes to zorp"):
        model(torch.ones(2, 4))
    model(torch.ones(2, 4)).float().sum().backward()
    assert model.zorp.tolist() == [3.0] * 4


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rehearsed", [False, True])
def test_sparse_buffers_and_inputs_are_cast(rehearsed: bool, dtype: torch.dtype) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("links", (0.3 * torch.eye(5)).to_sparse())

        def forward(self, x: Tensor, others: Tensor) -> Tensor:
            h = self.linear(x)
            return torch.sparse.mm(self.links, h) + torch.sparse.mm(others, h)

    torch.manual_seed(0)
    plain = Model()
    batch = torch.randn(5, 4), (0.7 * torch.eye(5)).to_sparse()
    model = cast_model(copy.deepcopy(plain), dtype, batch=batch if rehearsed else None)
    assert model.links.dtype == dtype
    assert "| links | buffer |" in str(cast_report(model))
    result = model(*batch)
    assert result.dtype == dtype
    assert (result.float() - plain(*batch)).abs().max() <= 4 * torch.finfo(dtype).eps
    with pytest.raises(mpcore.ArgumentError, match="'links', which is sparse"):
        cast_model(plain, dtype, keep_fp32="links")
    assert plain.links.dtype == torch.float32


def test_what_a_pass_caches_is_plain_or_can_be_copied() -> None:
    """A buffer that was None, and an attribute, made of a code."""

    class Cached(Turned):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cosines", None, persistent=False)
            self.sines: Any = None

        def forward(self, x: Tensor) -> Tensor:
            if self.cosines is None:
                angles = torch.outer(torch.arange(x.shape[-2]), self.blorb).repeat(1, 2)
                self.cosines, self.sines = angles.cos(), angles.sin()
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k = q * self.cosines + q * self.sines, k * self.cosines + k * self.sines
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v  # type: ignore[no-any-return]

    model = cast_model(Cached(), torch.bfloat16)
    x = torch.randn(2, 5, 8)
    first = model(x)
    assert type(model.cosines) is Tensor
    assert model.cosines.dtype == torch.float32
    for other in (model, copy.deepcopy(model)):
        assert torch.equal(other(x), first)
