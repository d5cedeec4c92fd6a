"""A cast model runs as the model did: casts at the borders of FP32 islands."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mpcore.cast_model import cast_model
from mpcore.precision.casts import cast_tensors
from torch import nn
from torch.utils.checkpoint import checkpoint

from mpcore_testing.models import (
    Block,
    Spy,
    gpt,
    tokens,
)

HALF = [torch.float16, torch.bfloat16]
Pair = namedtuple("Pair", "first second")


def test_norms_compute_in_fp32_and_hand_on_16_bits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    plain = copy.deepcopy(model)
    cast_model(model, torch.float16)
    x = torch.randn(4, 8)
    y = F.linear(x.half(), plain[0].weight.half(), plain[0].bias.half())
    y = plain[1](y.float()).half()
    expected = F.linear(y, plain[2].weight.half(), plain[2].bias.half())
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x.half()), expected)


def test_batch_norm_statistics_are_gathered_in_fp32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    reference = nn.BatchNorm2d(4)
    cast_model(model, torch.bfloat16)
    x = torch.randn(2, 3, 8, 8)
    assert model(x).dtype == torch.bfloat16
    reference(F.conv2d(x.bfloat16(), model[0].weight, model[0].bias).float())
    assert torch.equal(model[1].running_mean, reference.running_mean)
    assert torch.equal(model[1].running_var, reference.running_var)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tied", [False, True])
def test_a_gpt_trains_unchanged_and_gradients_have_their_weights_types(
    tied: bool, dtype: torch.dtype
) -> None:
    model = gpt(tied=tied)
    single = copy.deepcopy(model)
    cast_model(model, dtype)
    logits = model(tokens())
    assert logits.dtype == dtype
    F.cross_entropy(logits.float().view(-1, 11), tokens().view(-1)).backward()
    F.cross_entropy(single(tokens()).view(-1, 11), tokens().view(-1)).backward()
    for half, full in zip(model.parameters(), single.parameters(), strict=True):
        assert half.grad is not None
        assert full.grad is not None
        assert half.grad.dtype == half.dtype
        # a rough agreement, to see that every path carries gradient: roundings of a dozen layers
        scale = full.grad.abs().max()
        assert (half.grad.float() - full.grad).abs().max() <= 30 * torch.finfo(dtype).eps * scale


def test_inputs_of_16_bit_modules_are_cast_wherever_they_are_nested() -> None:
    @dataclasses.dataclass(frozen=True)
    class Batch:
        x: torch.Tensor
        index: torch.Tensor

    model = Spy()
    cast_model(model, torch.float16)
    x, index = torch.ones(2), torch.arange(2)
    model(
        [x, (index, x.double())],
        Pair(x, "text"),
        Batch(x, index),
        UserDict(a=x),
        options={"deep": [{"x": x.bfloat16()}], "none": None},
        ordered=OrderedDict(b=x),
    )
    (nest, pair, batch, user), kwargs = model.got
    halves = [nest[0], nest[1][1], pair.first, batch.x, user["a"], kwargs["ordered"]["b"]]
    halves.append(kwargs["options"]["deep"][0]["x"])
    assert [t.dtype for t in halves] == [torch.float16] * len(halves)
    assert (type(pair), type(batch), type(user)) == (Pair, Batch, UserDict)
    assert nest[1][0] is index
    assert batch.index is index
    assert pair.second == "text"


def test_the_models_own_inputs_are_cast() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return x[index] + self.linear(x)

    model = cast_model(Residual(), torch.float16)
    assert model(torch.ones(2, 4), index=torch.tensor([0, 1])).dtype == torch.float16


@pytest.mark.parametrize("parametrized", [False, True])
def test_fp32_tensors_made_inside_the_model_are_cast(parametrized: bool) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 4, bias=False)
            if parametrized:
                nn.utils.parametrizations.weight_norm(self.linear)

        def forward(self, n: int) -> torch.Tensor:
            return self.linear(torch.linspace(0, 1, n).unsqueeze(-1))  # type: ignore[no-any-return]

    assert cast_model(Positions(), torch.float16)(3).dtype == torch.float16


def test_casting_leaves_the_callers_containers_alone() -> None:
    x = torch.ones(2)
    given = {"x": [x]}
    result = cast_tensors(given, frozenset({torch.float32}), torch.float16)
    assert given["x"][0] is x
    assert result["x"][0].dtype == torch.float16


def test_casting_keeps_objects_that_hold_nothing_to_cast() -> None:
    cache = {"k": [torch.ones(2, dtype=torch.float16)], "n": (torch.arange(2), "s")}
    assert cast_tensors(cache, frozenset({torch.float32}), torch.float16) is cache


def test_casting_keeps_the_identity_of_a_tensor_given_twice() -> None:
    # MultiheadAttention takes its packed path when `query is key`
    x = torch.ones(2)
    a, b = cast_tensors((x, {"again": x}), frozenset({torch.float32}), torch.float16)
    assert a is b["again"]


def test_casting_ends_on_cyclic_containers() -> None:
    cycle: list[Any] = [torch.ones(1)]
    cycle.append(cycle)
    result = cast_tensors(cycle, frozenset({torch.float32}), torch.float16)
    assert result[0].dtype == torch.float16


def test_packed_sequences_are_cast() -> None:
    lstm = cast_model(nn.LSTM(4, 4, 2, bidirectional=True), torch.bfloat16)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 4), torch.tensor([5, 3]))
    output, (hidden, _) = lstm(packed)
    assert output.data.dtype == hidden.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.LSTM(16, 8, 2), lambda x: (x, (torch.zeros(2, 6, 8), torch.zeros(2, 6, 8)))),
        (nn.GRU(16, 8), lambda x: (x,)),
        (nn.MultiheadAttention(16, 2, batch_first=True), lambda x: (x, x, x)),
        (nn.MultiheadAttention(16, 2, kdim=16, vdim=8), lambda x: (x, x, x[..., :8])),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), lambda x: (x,)),
        (nn.Transformer(16, 2, 1, 1, 32, batch_first=True), lambda x: (x, x)),
        (nn.Sequential(nn.Conv1d(6, 4, 3), nn.GroupNorm(2, 4)), lambda x: (x,)),
        (nn.Bilinear(16, 16, 4), lambda x: (x, x)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(16, 4)), lambda x: (x,)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(16, 4, bias=False)), lambda x: (x,)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("training", [True, False])
def test_stock_modules_run_on_fp32_inputs_as_they_did(
    module: nn.Module, inputs: Any, training: bool, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(module).train(training)
    for submodule in model.modules():
        if isinstance(submodule, nn.Dropout):
            submodule.p = 0.0
        if isinstance(submodule, nn.MultiheadAttention):
            submodule.dropout = 0.0
    single = copy.deepcopy(model)
    cast_model(model, dtype)
    torch.manual_seed(1)
    x = torch.randn(2, 6, 16)
    with torch.set_grad_enabled(training):
        result, expected = model(*inputs(x)), single(*inputs(x))
    result = result[0] if isinstance(result, tuple) else result
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert result.dtype == dtype
    # a rough agreement, to see that it is the same function: roundings of a few layers
    bound = 20 * torch.finfo(dtype).eps * expected.abs().max()
    assert (result.float() - expected).abs().max() <= bound
    if training:
        result.float().sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*nested tensor")
@pytest.mark.parametrize("dtype", HALF)
def test_padded_encoder_runs_in_evaluation_where_pytorch_nests_tensors(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    single = copy.deepcopy(model)
    cast_model(model, dtype)
    x, padding = torch.randn(2, 6, 16), torch.arange(6).expand(2, 6) >= torch.tensor([[6], [4]])
    with torch.no_grad():
        result = model(x, src_key_padding_mask=padding)
        expected = single(x, src_key_padding_mask=padding)
    assert result.dtype == dtype
    assert (result.float() - expected).abs().max() <= 30 * torch.finfo(dtype).eps


def test_a_norms_weight_can_be_used_by_its_parent() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.layer_norm(x, (8,), self.norm.weight, self.norm.bias)
            return self.linear(x * self.norm.weight)  # type: ignore[no-any-return]

    model = cast_model(Functional(), torch.float16)
    assert model(torch.randn(2, 8)).dtype == torch.float16


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_a_cast_model_gives_the_same_gradients(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = cast_model(Block(16), torch.bfloat16)
    x = torch.randn(2, 8, 16).bfloat16().requires_grad_()
    expected = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    actual = [x.grad, *(p.grad for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_torch_compile_traces_a_cast_model_whole() -> None:
    model = cast_model(gpt(blocks=1), torch.bfloat16, keep_fp32="lm_head")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(tokens()), model(tokens()))


class Turning(nn.Module):
    """Counts, averages and turns by a position code, which it converts where they meet."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("inv_freq", 10000 ** (-torch.arange(8) / 8))
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("table", torch.linspace(0, 1, 8))

    def forward(self, x: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        angles = torch.arange(x.shape[-2])[:, None] * self.inv_freq + when[:, None, None]
        return self.out(self.linear(x) * angles.cos().to(x.dtype) + self.table)  # type: ignore[no-any-return]


def test_torch_compile_traces_kept_buffers_and_times_whole() -> None:
    torch.manual_seed(0)
    model = cast_model(Turning(), torch.bfloat16)
    x, when = torch.randn(2, 512, 8), torch.tensor([999.0, 3.5])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, when), model(x, when))
    assert torch.equal(compiled(x, when), model(x, when))
    assert model.passes == 4
