"""`cast_model`: what is cast, masters from the originals, copies and repeated casts."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import mpcore
import pytest
import torch
from mpcore.cast_model import cast_model
from mpcore.errors import StageError
from torch import nn

from mpcore_testing.models import (
    gpt,
    hook_count,
    snapshot,
    tokens,
    unchanged,
    wrapped,
)

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF)
def test_weights_are_rounded_in_place_and_norms_stay_fp32(dtype: torch.dtype) -> None:
    model = gpt()
    before, objects = snapshot(model), dict(model.named_parameters())
    assert cast_model(model, dtype) is model
    assert list(model.state_dict()) == list(before)
    for name, param in model.named_parameters():
        assert param is objects[name]
        expected = before[name] if ("norm" in name or "ln_f" in name) else before[name].to(dtype)
        assert param.dtype == expected.dtype
        assert torch.equal(param, expected)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_every_norm_family_keeps_parameters_and_statistics_in_fp32(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), copy.deepcopy(norm))
    cast_model(model, torch.float16)
    floating = [t for t in model[1].state_dict().values() if t.is_floating_point()]
    assert floating
    assert all(tensor.dtype == torch.float32 for tensor in floating)


@pytest.mark.parametrize("norm", [nn.LocalResponseNorm(2), nn.CrossMapLRN2d(2)])
def test_local_response_norms_square_their_input_in_fp32(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), copy.deepcopy(norm))
    seen: list[torch.dtype] = []
    cast_model(model, torch.float16)
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert model(torch.ones(1, 1, 2, 2)).dtype == torch.float16
    assert seen == [torch.float32]


def test_floating_buffers_are_cast_and_others_are_not() -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("table", torch.linspace(0, 1, 4))
    model.register_buffer("index", torch.arange(4))
    model.register_buffer("wave", torch.ones(4, dtype=torch.complex64))
    table = model.table
    cast_model(model, torch.bfloat16)
    assert model.table is table
    assert torch.equal(model.table, torch.linspace(0, 1, 4).bfloat16())
    assert model.index.dtype == torch.int64
    assert model.wave.dtype == torch.complex64


def test_buffer_values_beyond_the_range_become_the_largest_finite_value() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("mask", torch.tensor([-1e9, 1e9, -torch.inf, 65519.0, 1.0]))
    with pytest.warns(UserWarning, match=r"mask by up to 1e\+09"):
        cast_model(model, torch.float16)
    assert model.mask.tolist() == [-65504.0, 65504.0, -torch.inf, 65504.0, 1.0]


def test_a_buffer_shared_by_two_modules_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    table = torch.ones(2)
    for module in model:
        module.register_buffer("table", table)
    cast_model(model, torch.float16)
    assert model[0].table is model[1].table
    assert model[0].table.dtype == torch.float16


def test_complex_and_integer_parameters_are_left_alone() -> None:
    model = nn.Linear(2, 2)
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    model.count = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    cast_model(model, torch.float16)
    assert model.phase.dtype == torch.complex64
    assert model.count.dtype == torch.int64


@pytest.mark.parametrize("dtype", HALF)
def test_fp32_originals_become_masters_without_a_copy(dtype: torch.dtype) -> None:
    model = gpt(tied=True)
    optimizer = wrapped(model)
    before = snapshot(model)
    storage = {name: p.data_ptr() for name, p in model.named_parameters()}
    cast_model(model, dtype, optimizer, keep_fp32="blocks.0")
    for name, param in model.named_parameters():
        if param.dtype == torch.float32:
            assert "master" not in optimizer.state[param]
            continue
        master = optimizer.state[param]["master"]
        assert master.data_ptr() == storage[name]
        assert torch.equal(master, before[name])
        assert torch.equal(param, before[name].to(dtype))


def test_writing_a_master_does_not_mark_its_weight_as_written() -> None:
    model = nn.Linear(4, 4)
    optimizer = wrapped(model)
    cast_model(model, torch.float16, optimizer)
    version = model.weight._version
    optimizer.state[model.weight]["master"].add_(1)
    assert model.weight._version == version


def test_training_after_the_cast_starts_from_the_originals() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1 + 2.0**-12)  # rounds to 1 in FP16
    optimizer = mpcore.MixedPrecisionOptimizer(
        torch.optim.SGD(model.parameters(), lr=2.0**-11), mpcore.NoLossScale()
    )
    cast_model(model, torch.float16, optimizer)
    assert model.weight.item() == 1.0
    optimizer.backward(-model(torch.ones(1, 1)).float().sum())
    optimizer.step()
    assert optimizer.state[model.weight]["master"].item() == 1 + 2.0**-12 + 2.0**-11
    assert model.weight.item() == 1 + 2.0**-10


def test_frozen_parameters_need_not_be_the_optimizers() -> None:
    model = gpt()
    model.wte.requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD(trainable, lr=0.1))
    cast_model(model, torch.float16, optimizer)
    assert model.wte.weight.dtype == torch.float16


def test_a_failure_to_adopt_masters_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = gpt()
    optimizer = wrapped(model)
    before = snapshot(model)

    def fail(pairs: Any) -> None:
        raise StageError("no masters today")

    monkeypatch.setattr(optimizer, "adopt_masters", fail)
    with pytest.raises(StageError, match="no masters today"):
        cast_model(model, torch.float16, optimizer)
    assert unchanged(model, before)
    assert hook_count(model) == 0


def test_a_cast_model_can_be_copied_pickled_and_saved() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    cast_model(model, torch.float16, keep_fp32="2")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = torch.randn(3, 8)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(x), model(x))
        assert other(x).dtype == torch.float32


def test_casting_twice_is_casting_once() -> None:
    model = cast_model(gpt(), torch.float16, keep_fp32="lm_head")
    before, result = snapshot(model), model(tokens())
    hooks = hook_count(model)
    cast_model(model, torch.float16, keep_fp32="lm_head")
    assert hook_count(model) == hooks
    assert unchanged(model, before)
    assert torch.equal(model(tokens()), result)


def test_a_part_may_be_cast_before_the_whole() -> None:
    model = gpt()
    cast_model(model.blocks[0], torch.float16)
    cast_model(model, torch.float16)
    assert model(tokens()).dtype == torch.float16


@pytest.mark.parametrize(("dtype", "keep"), [(torch.float16, "lm_head"), (torch.bfloat16, None)])
def test_casting_again_with_other_choices_raises(dtype: torch.dtype, keep: str | None) -> None:
    model = cast_model(gpt(), torch.float16)
    before = snapshot(model)
    with pytest.raises(StageError, match="cast otherwise"):
        cast_model(model, dtype, keep_fp32=keep)
    assert unchanged(model, before)


def test_a_model_that_is_16_bit_already_gets_fp32_norms_and_casts() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).half()
    cast_model(model, torch.float16)
    assert model[0].weight.dtype == torch.float16
    assert model[1].weight.dtype == torch.float32
    assert model(torch.randn(2, 8)).dtype == torch.float16
