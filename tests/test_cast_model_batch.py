"""`cast_model(batch=...)`: a dry run over copies, which leaves everything as it was."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import torch
from mpcore import cast_model, cast_report
from mpcore.errors import ArgumentError
from torch import Tensor, nn

from mpcore_testing.models import hook_count, snapshot, unchanged, wrapped

HALF = [torch.float16, torch.bfloat16]


class Model(nn.Module):
    """Averages, reads a table, drops out; may follow the table's type."""

    def __init__(self, follows: bool = False) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("trail", torch.tensor([1.001, 0.3, 0.007, 0.5]))
        self.register_buffer("table", torch.tensor([0.1, 0.3, 0.2, 0.123]))
        self.follows, self.calls = follows, 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        x += 1
        self.trail.data.mul_(0.999)
        y = self.drop(self.norm(self.linear(x) * self.table))
        random.random()
        y = y.to(self.table.dtype) * 2 if self.follows else y
        return self.last(y) * scale  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "batch",
    [torch.ones(3, 4), (torch.ones(3, 4), 2.0), {"x": torch.ones(3, 4), "scale": 2.0}],
    ids=["a tensor", "a tuple", "a dictionary"],
)
def test_what_a_dry_run_sees_stays_in_fp32_and_is_never_rounded(
    batch: Any, dtype: torch.dtype
) -> None:
    plain = Model()
    model = cast_model(copy.deepcopy(plain), dtype, batch=batch)
    assert torch.equal(model.trail, plain.trail)
    assert torch.equal(model.table, plain.table)
    report = str(cast_report(model))
    assert "| trail | buffer | float32 | 0 | written by the forward pass |" in report
    assert "no more FP32 activations" in report
    for _ in range(3):
        assert model(torch.ones(3, 4)).dtype == dtype
        plain(torch.ones(3, 4))
    assert torch.equal(model.trail, plain.trail)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_table_that_would_make_activations_fp32_is_cast(dtype: torch.dtype) -> None:
    model = Model(follows=True)
    model.register_buffer("other", torch.tensor([0.7, 0.3, 0.1]))
    cast_model(model, dtype, batch=torch.ones(3, 4))
    assert model.table.dtype == dtype
    assert model.other.dtype == model.trail.dtype == torch.float32


def test_a_dry_run_leaves_model_generators_and_batch_as_they_were() -> None:
    """All but what the cast itself does, which a model cast without a batch shows."""
    x = torch.randn(3, 4)
    given, plain = x.clone(), Model()
    expected = cast_model(copy.deepcopy(plain), torch.float16)
    torch.manual_seed(0)
    random.seed(0)
    states = torch.get_rng_state(), random.getstate()
    model = cast_model(copy.deepcopy(plain), torch.float16, batch=given)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.equal(given, x)
    assert model.calls == 0
    assert hook_count(model) == hook_count(expected)
    assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    assert [p.requires_grad for p in model.parameters()] == [True] * 6
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("batch", [torch.ones(3, 5), {"y": 1}, (1, 2, 3)])
def test_a_batch_that_does_not_run_is_an_error_and_changes_nothing(batch: Any) -> None:
    model = Model()
    optimizer, before = wrapped(model), snapshot(model)
    with pytest.raises(ArgumentError, match="batch: expected one that the model runs on, got "):
        cast_model(model, torch.float16, optimizer, batch=batch)
    assert unchanged(model, before)
    assert hook_count(model) == 0
    assert not optimizer.state


def test_a_model_that_does_not_run_in_16_bits_is_found_before_it_is_cast() -> None:
    class Fft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(self.linear(x)).abs()

    model = nn.Sequential(Fft(), nn.Linear(3, 2))
    before = snapshot(model)
    with pytest.raises(ArgumentError, match=r"Unsupported dtype.*keep_fp32"):
        cast_model(model, torch.bfloat16, batch=torch.ones(2, 4))
    assert unchanged(model, before)
    assert hook_count(model) == 0
    cast_model(model, torch.bfloat16, keep_fp32="0", batch=torch.ones(2, 4))


def test_a_warning_that_is_an_error_leaves_the_model_uncast() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("angles", torch.arange(300).float().reshape(2, 150) * 1.1)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="rounds buffers"):
            cast_model(model, torch.bfloat16)
    assert unchanged(model, before)
    assert hook_count(model) == 0


def test_choices_of_modules_hold_in_the_dry_run() -> None:
    model = Model()
    cast_model(model, torch.float16, keep_fp32=[model.linear, nn.Dropout], batch=torch.ones(3, 4))
    assert model.linear.weight.dtype == torch.float32
    assert model.trail.dtype == torch.float32
