"""`keep_fp32`: what it takes, and what kept modules are given and return."""

from __future__ import annotations

import copy
from typing import Any

import mpcore
import pytest
import torch
from mpcore.cast_model import cast_model
from mpcore.precision.casts import CastInputs, hooks_of
from torch import nn

from mpcore_testing.models import (
    Spy,
    gpt,
    hook_count,
    snapshot,
    tokens,
    unchanged,
)

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    "keep",
    [
        "blocks.0.up",
        ["blocks.0.up"],
        ["*.0.up"],
        lambda name, module: name == "blocks.0.up",
        [lambda name, module: isinstance(module, nn.Linear) and name.endswith("0.up")],
    ],
)
def test_keep_fp32_takes_names_patterns_and_functions(keep: Any) -> None:
    model = cast_model(gpt(), torch.float16, keep_fp32=keep)
    assert model.blocks[0].up.weight.dtype == torch.float32
    assert model.blocks[1].up.weight.dtype == torch.float16
    assert model(tokens()).dtype == torch.float16


def test_keep_fp32_takes_modules_and_classes() -> None:
    model = gpt()
    cast_model(model, torch.float16, keep_fp32=(model.blocks[1], nn.Embedding))
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert "wte.weight" in kept
    assert "blocks.1.down.bias" in kept
    assert "blocks.0.down.bias" not in kept
    assert model(tokens()).dtype == torch.float16


def test_a_kept_module_gets_fp32_and_hands_on_16_bits() -> None:
    spy = Spy()
    model = nn.Sequential(nn.Linear(4, 4), spy, nn.Linear(4, 4))
    cast_model(model, torch.bfloat16, keep_fp32=Spy)
    seen: list[torch.dtype] = []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert model(torch.randn(2, 4)).dtype == torch.bfloat16
    assert spy.got[0][0].dtype == torch.float32
    assert seen == [torch.bfloat16]


def test_modules_without_weights_can_be_kept_for_their_reductions() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 4))
    seen: list[torch.dtype] = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    cast_model(model, torch.float16, keep_fp32=nn.Softmax)
    model(torch.randn(2, 4))
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    model(torch.randn(2, 4))
    assert seen == [torch.float16, torch.float16, torch.float32]  # before and after the cast hook


def test_a_kept_output_layer_returns_fp32() -> None:
    model = cast_model(gpt(), torch.float16, keep_fp32=["lm_head"])
    assert model.lm_head.weight.dtype == torch.float32
    assert model(tokens()).dtype == torch.float32


def test_two_kept_heads_both_return_fp32_and_a_kept_trunk_does_not() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.body = nn.Linear(4, 4), nn.Linear(4, 4)
            self.policy, self.value = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 1), nn.Tanh())

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            trunk = self.trunk(x)
            x = self.body(trunk)
            return trunk, self.policy(x), self.value(x)

    model = cast_model(Heads(), torch.float16, keep_fp32=["trunk", "policy", "value"])
    dtypes = [y.dtype for y in model(torch.randn(2, 4))]
    assert dtypes == [torch.float16, torch.float32, torch.float32]


def test_a_final_norm_hands_on_16_bits_unless_it_is_named() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    named = cast_model(copy.deepcopy(layers), torch.float16, keep_fp32="1")
    assert cast_model(layers, torch.float16)(torch.ones(1, 4)).dtype == torch.float16
    assert named(torch.ones(1, 4)).dtype == torch.float32


@pytest.mark.parametrize(
    "model",
    [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.ModuleDict({"a": nn.Linear(4, 4)})],
)
def test_keeping_the_whole_model_changes_nothing(model: nn.Module) -> None:
    before = snapshot(model)
    cast_model(model, torch.float16, keep_fp32=lambda name, module: True)
    assert unchanged(model, before)
    assert hook_count(model) == 0


def test_parametrizations_can_be_kept_where_their_kernels_need_fp32() -> None:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    model = cast_model(nn.Sequential(layer), torch.bfloat16, keep_fp32="*.parametrizations")
    assert model[0].weight.dtype == torch.bfloat16
    assert model(torch.randn(2, 4)).dtype == torch.bfloat16


def test_a_kept_list_of_modules_is_kept_module_by_module() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.body = nn.Linear(4, 4)
            self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)})

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            for layer in self.layers:
                x = layer(x)
            y = self.body(x)
            return x, y, self.heads["a"](y), self.heads["b"](y)

    model = cast_model(Listed(), torch.float16, keep_fp32=["layers", "heads"])
    dtypes = [y.dtype for y in model(torch.randn(2, 4))]
    assert dtypes == [torch.float16, torch.float16, torch.float32, torch.float32]


def test_a_module_shared_under_two_names_is_kept_by_either() -> None:
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": linear, "b": linear, "c": nn.Linear(4, 4)})
    cast_model(model, torch.float16, keep_fp32="b")
    assert linear.weight.dtype == torch.float32
    assert hooks_of(linear)[0] == CastInputs(torch.float32)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(nn.Embedding, torch.float16), (nn.EmbeddingBag, torch.bfloat16)]
)
def test_a_table_that_its_forward_pass_renormalises_trains_as_in_fp32(
    kind: Any, dtype: torch.dtype
) -> None:
    """2,000 steps that turn rows along the bound by less than a last place of 16 bits each."""
    torch.manual_seed(0)
    plain = nn.Sequential(kind(10, 4, max_norm=1.0))
    model = copy.deepcopy(plain)
    ours = mpcore.MixedPrecisionOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-3), mpcore.NoLossScale()
    )
    cast_model(model, dtype, ours)
    assert model[0].weight.dtype == torch.float32
    theirs = torch.optim.SGD(plain.parameters(), lr=1e-3)
    rows = torch.arange(10)[:, None] if kind is nn.EmbeddingBag else torch.arange(10)
    pull = torch.tensor([0.5, -0.25, 0.125, 1.0])
    for _ in range(2000):
        out = model(rows)
        assert out.dtype == dtype
        ours.backward(-(out.float() * pull).sum())
        ours.step()
        ours.zero_grad()
        (-(plain(rows) * pull).sum()).backward()
        theirs.step()
        theirs.zero_grad()
    with torch.no_grad():
        model(rows), plain(rows)
    assert (plain[0].weight.norm(dim=1) > 0.999).all()
    assert (model[0].weight - plain[0].weight).abs().max() < 2e-3


def test_a_table_without_a_bound_is_cast() -> None:
    model = cast_model(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 1)), torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_a_renormalised_table_that_is_tied_to_a_16_bit_layer_is_named() -> None:
    model = nn.Sequential(nn.Embedding(3, 2, max_norm=1.0), nn.Linear(2, 3, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(mpcore.ArgumentError, match=r"got '0\.weight' kept and '1\.weight' cast"):
        cast_model(model, torch.float16)
    cast_model(model, torch.float16, keep_fp32=["1"])  # as the message says
    assert model(torch.tensor([0])).dtype == torch.float32


@pytest.mark.parametrize("way", ["matrix_exp", "cayley", "householder"])
@pytest.mark.parametrize("dtype", HALF)
def test_an_orthogonal_weight_is_computed_in_fp32(dtype: torch.dtype, way: str) -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map=way)
    model = cast_model(nn.Sequential(layer), dtype)
    weight = model[0].weight
    assert weight.dtype == dtype
    assert (weight.float() @ weight.float().T - torch.eye(6)).abs().max() < torch.finfo(dtype).eps
    assert model(torch.randn(2, 6)).dtype == dtype


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.CosineSimilarity(), (torch.zeros(2, 4), torch.ones(2, 4))),
        (nn.LPPool1d(2, 2), (torch.full((1, 2, 4), 300.0),)),
        (nn.LPPool2d(2, 2), (torch.full((1, 2, 4, 4), 300.0),)),
        (nn.PoissonNLLLoss(log_input=False), (torch.zeros(2), torch.ones(2))),
        (nn.GaussianNLLLoss(), (torch.ones(2, 1), torch.zeros(2, 1), torch.zeros(2, 1))),
        (
            nn.CTCLoss(),
            (
                torch.zeros(5, 1, 3).log_softmax(-1),
                torch.tensor([[1]]),
                torch.tensor([5]),
                torch.tensor([1]),
            ),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules_that_fp16_breaks_compute_in_fp32(module: nn.Module, inputs: Any) -> None:
    """Each gives NaN or infinity in FP16 or has no kernel for it."""
    model = cast_model(nn.ModuleList([nn.Linear(2, 2), copy.deepcopy(module)]), torch.float16)
    expected = module(*inputs)
    result = model[1](*inputs)
    assert expected.isfinite().all()
    assert torch.equal(result, expected.to(result.dtype))
    assert result.dtype == (torch.float32 if "Loss" in type(module).__name__ else torch.float16)
    with torch.no_grad():
        low = [x.half() if x.is_floating_point() else x for x in inputs]
        assert breaks(module, low)


def breaks(module: nn.Module, inputs: Any) -> bool:
    try:
        return not bool(module(*inputs).isfinite().all())
    except (RuntimeError, NotImplementedError):
        return True


def test_keep_fp32_takes_names_of_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in model:
        layer.register_buffer("tab", torch.tensor([0.1, 0.3, 0.2]))
    cast_model(model, torch.float16, keep_fp32=["*.tab", "1"])
    assert model[0].tab.dtype == model[1].tab.dtype == torch.float32
    assert [layer.weight.dtype for layer in model] == [torch.float16, torch.float32]
    with pytest.raises(mpcore.ArgumentError, match=r"modules or buffers.*'tub'"):
        cast_model(nn.Linear(1, 1), torch.float16, keep_fp32="tub")


def test_a_report_says_what_was_kept_and_why() -> None:
    model = nn.Sequential(nn.Embedding(3, 2, max_norm=1.0), nn.LayerNorm(2), nn.Linear(2, 2))
    model.append(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    model.append(nn.CosineSimilarity())
    model[2].register_buffer("flags", torch.tensor([0.0, 1.0]))
    report = mpcore.cast_report(cast_model(model, torch.float16, keep_fp32=["3", "3.0"]))
    assert [row.name for row in report.rows if row.what == "module"] == ["0", "1", "3", "4"]
    text = str(report)
    for line in (
        "| 2 parameters | weights | float16 |",
        "| 0 | module | float32 | 0 | its forward pass writes to its weight (max_norm) |",
        "| 1 | module | float32 | 0 | a normalisation |",
        "| 3 | module | float32 | 0 | named in keep_fp32 |",
        "| 4 | module | float32 | 0 | its operations are broken in 16 bits |",
        "| 2.flags | buffer | float16 | 0 | exact |",
    ):
        assert line in text
    for other in (nn.Linear(1, 1), model[2]):
        with pytest.raises(mpcore.ArgumentError, match="carries no report"):
            mpcore.cast_report(other)
    with pytest.raises(mpcore.ArgumentTypeError):
        mpcore.cast_report(report)  # type: ignore[arg-type]
