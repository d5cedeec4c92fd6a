"""`cast_model` on bad input: one clear error, and nothing has changed."""

from __future__ import annotations

from typing import Any

import mpcore
import pytest
import torch
from mpcore.cast_model import cast_model
from mpcore.errors import ArgumentError, ArgumentTypeError, StageError
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


@pytest.mark.parametrize(
    ("dtype", "value", "shown"),
    [
        (torch.float16, 65520.0, "65520"),
        (torch.float16, -1e6, "1e+06"),
        (torch.float16, torch.inf, "inf"),
        (torch.bfloat16, 3.4e38, "3.4e+38"),
        (torch.bfloat16, torch.nan, "nan"),
    ],
)
def test_a_weight_that_the_format_cannot_represent_raises_by_name(
    dtype: torch.dtype, value: float, shown: str
) -> None:
    model = gpt()
    with torch.no_grad():
        model.blocks[1].down.weight[3, 5] = value
    optimizer = wrapped(model)
    before = snapshot(model)
    with pytest.raises(ArgumentError) as error:
        cast_model(model, dtype, optimizer)
    assert "'blocks.1.down.weight'" in str(error.value)
    assert shown in str(error.value)
    assert {k: v.dtype for k, v in model.state_dict().items()} == {
        k: v.dtype for k, v in before.items()
    }
    assert hook_count(model) == 0
    assert not optimizer.state


def test_the_largest_weight_that_rounds_to_a_finite_value_is_cast() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(65519.0)
    assert cast_model(model, torch.float16).weight.item() == 65504.0


def test_large_weights_of_kept_modules_are_no_obstacle() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with torch.no_grad():
        model[1].weight.fill_(1e6)
    cast_model(model, torch.float16)


def bad_calls() -> dict[str, tuple[type[Exception], str, Any]]:
    def double(model: nn.Module) -> None:
        cast_model(model.double(), torch.float16)

    def other_half(model: nn.Module) -> None:
        cast_model(model.bfloat16(), torch.float16)

    def stranger(model: nn.Module) -> None:
        inner = torch.optim.SGD(list(model.parameters())[1:], lr=0.1)
        cast_model(model, torch.float16, mpcore.MixedPrecisionOptimizer(inner))

    def bare(model: nn.Module) -> None:
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        cast_model(model, torch.float16, optimizer)

    def kept(choice: Any) -> Any:
        return lambda model: cast_model(model, torch.float16, keep_fp32=choice)

    return {
        "not a module": (ArgumentTypeError, "model: ", lambda m: cast_model("x", torch.float16)),  # type: ignore[type-var]
        "a name for a dtype": (ArgumentTypeError, "dtype: ", lambda m: cast_model(m, "fp16")),  # type: ignore[arg-type]
        "not 16-bit": (ArgumentError, "dtype: ", lambda m: cast_model(m, torch.float32)),
        "FP64 weights": (ArgumentError, "torch.float64", double),
        "the other format": (ArgumentError, "torch.bfloat16", other_half),
        "a parameter too few": (ArgumentError, "'wpe'", stranger),
        "not wrapped": (ArgumentTypeError, "Wrap it first", bare),
        "unknown name": (ArgumentError, "'lm_haed'", kept("lm_haed")),
        "unknown class": (ArgumentError, "Conv2d", kept([nn.Conv2d])),
        "unknown module": (ArgumentError, "a Linear", kept(nn.Linear(1, 1))),
        "no module class": (ArgumentTypeError, "got int", kept([int])),
        "no choice": (ArgumentTypeError, "got int", kept([3])),
        "no list": (ArgumentTypeError, "got int", kept(3)),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_bad_arguments_raise_one_clear_error_and_change_nothing(case: str) -> None:
    kind, text, call = bad_calls()[case]
    model = gpt()
    with pytest.raises(kind) as error:
        call(model)
    assert text in str(error.value)
    assert hook_count(model) == 0
    assert len({p.dtype for p in model.parameters()}) == 1


def test_a_parameter_with_a_gradient_raises() -> None:
    model = gpt()
    model(tokens()).sum().backward()
    before = snapshot(model)
    with pytest.raises(StageError, match="'wpe'"):
        cast_model(model, torch.float16)
    assert unchanged(model, before)
    for param in model.parameters():
        param.grad = None
    cast_model(model, torch.float16)
    model(tokens()).sum().backward()  # the gradient accumulators have taken up the new type


@pytest.mark.parametrize(("keep", "other"), [("lm_head", "wte"), ("wte", "lm_head")])
def test_tied_weights_kept_on_one_side_only_raise(keep: str, other: str) -> None:
    model = gpt(tied=True)
    with pytest.raises(ArgumentError) as error:
        cast_model(model, torch.float16, keep_fp32=keep)
    assert f"'{keep}.weight' kept and '{other}.weight' cast" in str(error.value)
    cast_model(model, torch.float16, keep_fp32=["lm_head", "wte"])
    assert model.wte.weight is model.lm_head.weight
    assert model(tokens()).dtype == torch.float32


def test_a_norm_shared_between_a_kept_module_and_the_rest_raises() -> None:
    norm = nn.LayerNorm(4)
    model = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(4, 4), norm), "b": norm, "c": nn.Linear(4, 4)}
    )
    with pytest.raises(ArgumentError, match=r"'b' .* 'a\.1'"):
        cast_model(model, torch.float16, keep_fp32="a")


def test_the_inside_of_an_attention_cannot_be_kept_alone() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(ArgumentError, match="Keep 'self_attn' instead"):
        cast_model(model, torch.float16, keep_fp32="self_attn.out_proj")
    cast_model(model, torch.float16, keep_fp32="self_attn")
    assert model(torch.randn(2, 3, 16)).dtype == torch.float16


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_parameters_without_values_raise() -> None:
    for model in (nn.LazyLinear(2), nn.Linear(2, 2, device="meta")):
        with pytest.raises(ArgumentError, match="'weight' without values"):
            cast_model(model, torch.float16)


def test_a_model_inside_distributed_data_parallel_raises() -> None:
    class Parallel(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)  # no process group is needed to be one
            self.module = module

    with pytest.raises(StageError, match="then wrap it"):
        cast_model(Parallel(nn.Linear(2, 2)), torch.float16)
