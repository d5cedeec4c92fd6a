"""Tensors that give way: the type and the bits of what they compute, operation by operation."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mpcore.precision.weak import RunningTensor, WeakTensor, plain
from mpcore.precision.writes import WriteWatch
from torch import Tensor

HALF = [torch.float16, torch.bfloat16]
TABLE = torch.tensor([[0.1, 1 / 3, 2049.0, 1e-6], [3.3, -7.7, 0.0, 1e5]])

# functions of a table [2, 4] and a tensor [3, 2, 4] or [.., 4]
CONSTANT: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "product": lambda t, x: x * t,
    "product, other way": lambda t, x: t * x,
    "matmul": lambda t, x: x @ t.T,
    "einsum": lambda t, x: torch.einsum("bij,kj->bik", x, t),
    "linear": lambda t, x: F.linear(x, t),
    "cat": lambda t, x: torch.cat((x[0], t)),
    "stack": lambda t, x: torch.stack([t, x[0]]),
    "where": lambda t, x: torch.where(x > 0, x, t),
    "lerp": lambda t, x: torch.lerp(x[0], t, 0.5),
    "addcmul": lambda t, x: torch.addcmul(x[0], t, t),
    "masked_fill": lambda t, x: x.masked_fill(x > 0, t[1, 3]),
    "index_add": lambda t, x: x[0].index_add(0, torch.tensor([0, 1]), t),
    "index_put": lambda t, x: x.clone().index_put((torch.tensor([0]),), t),
    "setitem": lambda t, x: _set(x.clone(), t),
    "in place": lambda t, x: x.clone().mul_(t),
    "attention": lambda t, x: F.scaled_dot_product_attention(x, t[None], x),
    "keywords": lambda t, x: torch.add(input=x, other=t),
    "embedding": lambda t, x: F.embedding(torch.tensor([1, 0]), t) + x[0],
    "layer norm": lambda t, x: F.layer_norm(x, (4,), t[0], t[1]),
    "comparison": lambda t, x: (x > t).to(x.dtype),
}


def _set(x: Tensor, table: Tensor) -> Tensor:
    x[1] = table
    return x


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_beside_16_bits_is_what_it_would_be_if_it_were_cast(
    name: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4).to(dtype)
    limits = torch.finfo(dtype)
    expected = CONSTANT[name](TABLE.clamp(limits.min, limits.max).to(dtype), x)
    result = CONSTANT[name](TABLE.as_subclass(WeakTensor), x)
    assert type(result) is Tensor
    assert result.dtype == dtype
    assert torch.equal(result, expected)


@pytest.mark.parametrize("kind", [WeakTensor, RunningTensor])
def test_alone_it_computes_in_fp32_and_what_comes_of_it_gives_way(kind: type[WeakTensor]) -> None:
    table = TABLE.clone().as_subclass(kind)
    found = {
        "arithmetic": 2 * table + 1,
        "integers": table * torch.arange(4),
        "other FP32": torch.outer(torch.arange(3.0), table[0]),
        "a view": table.T[1:],
        "data": table.data,
        "one of several": table.max(1)[0],
        "a named one": table.max(1).values,
        "a piece": table.chunk(2)[1],
        "like it": torch.zeros_like(table),
        "a copy": table.clone().detach(),
    }
    for name, each in found.items():
        assert type(each) is kind, name
        assert each.dtype == torch.float32, name
    assert torch.equal(plain(found["arithmetic"]), 2 * TABLE + 1)
    assert type(table.sum().item()) is float
    assert type(table > 0) is Tensor
    assert type(table * torch.ones(4, requires_grad=True)) is Tensor


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_statistics_of_16_bits_are_widened_to_a_running_tensor(dtype: torch.dtype) -> None:
    mean = torch.ones(4).as_subclass(RunningTensor)
    seen = torch.randn(4).to(dtype)
    for result in (
        0.999 * mean + 0.001 * seen,
        torch.lerp(mean, seen, 0.001),
        torch.where(seen > 0, mean, seen),
        torch.addcmul(mean, seen, seen, value=0.001),
    ):
        assert type(result) is RunningTensor
        assert result.dtype == torch.float32
    expected = 0.999 * torch.ones(4) + (0.001 * seen).float()
    assert torch.equal(plain(0.999 * mean + 0.001 * seen), expected)
    x = torch.randn(8, 4).to(dtype)
    assert (x - mean).dtype == (x @ mean).dtype == (x[0] @ mean).dtype == dtype
    assert torch.bucketize(seen, mean).dtype == torch.int64
    assert torch.cdist(x, mean[None]).dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_is_written_into_it_is_widened(dtype: torch.dtype) -> None:
    x = torch.tensor([0.1, 0.2, 0.3, 0.4]).to(dtype)
    for write in (
        lambda t: t.copy_(x),
        lambda t: t.zero_().add_(x),
        lambda t: t.__setitem__(slice(None), x),
        lambda t: t.zero_().index_add_(0, torch.arange(4), x),
        lambda t: t.scatter_(0, torch.arange(4), x),
        lambda t: torch.mul(x, 1, out=t),
        lambda t: torch._foreach_copy_([t], [x]),
        lambda t: t.lerp_(x, 1.0),
    ):
        table = torch.ones(4)
        write(table.as_subclass(WeakTensor))
        assert torch.equal(table, x.float())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_conversions_stay_within_the_range(dtype: torch.dtype) -> None:
    table = torch.tensor([-1e9, -torch.inf, 3.4e38]).as_subclass(WeakTensor)
    limits = torch.finfo(dtype)
    like = torch.ones((), dtype=dtype)
    for result in (table.to(dtype), table.to(like), table.type_as(like), table.type(dtype)):
        assert type(result) is Tensor
        assert result.dtype == dtype
        assert result[0] == max(-1e9, limits.min) or dtype == torch.bfloat16
        assert result[1:].tolist() == [-torch.inf, limits.max]
        assert result.isfinite().tolist() == [True, False, True]


def test_operations_of_others_get_what_they_are_given() -> None:
    @torch.library.custom_op("mpcore_tests::count_", mutates_args=["counter"])
    def count_(x: Tensor, counter: Tensor) -> None:
        counter += x.numel()

    counter = torch.zeros(2)
    torch.ops.mpcore_tests.count_(torch.ones(4, 4).half(), counter.as_subclass(WeakTensor))
    assert counter.tolist() == [16.0, 16.0]


def test_it_pickles_as_what_it_is() -> None:
    table = pickle.loads(pickle.dumps(TABLE.as_subclass(WeakTensor)))
    assert type(table) is WeakTensor
    assert torch.equal(plain(table), TABLE)


def test_writes_are_followed_in_fp32_through_views_of_several_tensors() -> None:
    first = torch.full((2, 3), 2048.0, dtype=torch.float16)
    second, third = torch.zeros(4, dtype=torch.float16), torch.ones(3, dtype=torch.float16)
    with WriteWatch({"a": first, "b": second, "c": third}, {}) as watch:
        first.T[1:].add_(1)
        first[0].data[2:].add_(0.25)
        torch._foreach_add_([second, second[1:]], [1.0, 2.0**-12])
        second.add_(third.sum())
    assert watch.shadows["a"].tolist() == [[2048, 2049, 2049.25], [2048, 2049, 2049]]
    assert watch.shadows["b"].tolist() == [4.0, *[4 + 2.0**-12] * 3]
    assert "c" not in watch.shadows
    assert first.tolist() == [[2048.0] * 3] * 2


def test_an_original_that_somebody_wrote_over_is_forgotten() -> None:
    original = torch.tensor([0.1, 0.2])
    for written in (False, True):
        tensor = original.half()
        if written:
            tensor[1] = 5
        with WriteWatch({"a": tensor}, {"a": original}) as watch:
            tensor.mul_(1)
        expected = tensor.float() if written else original
        assert torch.equal(watch.shadows["a"], expected)
