"""Policies: every cell of the table in docs/policies.md, and overrides."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import mpcore
import pytest
import torch
import torch.nn.functional as F
from mpcore.cast_model import cast_model
from mpcore.loss_scale import DynamicLossScale, NoLossScale
from mpcore.policy import Policy
from torch import nn

from mpcore_testing.models import gpt, hook_count, snapshot, tokens, unchanged, wrapped
from mpcore_testing.products import Recorder

F16, B16, F32 = torch.float16, torch.bfloat16, torch.float32
# name: parameters, compute, masters, loss scale
TABLE: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype | None, Any]] = {
    "float32": (F32, F32, None, NoLossScale()),
    "mixed_float16": (F32, F16, None, DynamicLossScale()),
    "mixed_bfloat16": (F32, B16, None, NoLossScale()),
    "float16": (F16, F16, F32, DynamicLossScale()),
    "bfloat16": (B16, B16, F32, NoLossScale()),
}
MIXED = ["mixed_float16", "mixed_bfloat16"]
CAST = ["float16", "bfloat16"]


@pytest.mark.parametrize("name", TABLE)
def test_policy_states_its_types_and_its_loss_scale(name: str) -> None:
    policy = Policy(name)
    found = policy.param_dtype, policy.compute_dtype, policy.master_dtype, policy.loss_scale()
    assert found == TABLE[name]
    assert policy.output_dtype == F32


@pytest.mark.parametrize("name", TABLE)
def test_applied_policy_gives_parameters_masters_and_results_their_types(name: str) -> None:
    param_dtype, _, master_dtype, _ = TABLE[name]
    model = gpt()
    before = snapshot(model)
    optimizer = wrapped(model)
    assert Policy(name).apply(model, optimizer) is model
    for key, param in model.named_parameters():
        is_norm = "norm" in key or "ln_f" in key
        assert param.dtype == (F32 if is_norm else param_dtype)
        master = optimizer.state[param].get("master")
        if is_norm or master_dtype is None:
            assert master is None
        else:
            assert master.dtype == master_dtype
            assert torch.equal(master, before[key])
    assert model(tokens()).dtype == F32


@pytest.mark.parametrize("name", TABLE)
def test_applied_policy_multiplies_matrices_in_its_compute_type(name: str) -> None:
    model = Policy(name).apply(gpt())
    with Recorder() as recorder:
        model(tokens())
    assert len(recorder.seen) == 2 * 5 + 1  # linear layers and attention; the output layer
    assert {dtype for _, dtype in recorder.seen} == {TABLE[name][1]}


@pytest.mark.parametrize("name", TABLE)
def test_an_overridden_output_layer_computes_and_returns_fp32(name: str) -> None:
    model = Policy(name).apply(gpt(), overrides={"lm_head": "float32"})
    assert model.lm_head.weight.dtype == F32
    with Recorder() as recorder:
        logits = model(tokens())
    assert logits.dtype == F32
    dtypes = [dtype for _, dtype in recorder.seen]
    assert dtypes == [TABLE[name][1]] * 10 + [F32]


@pytest.mark.parametrize("name", TABLE)
def test_applied_policy_trains_with_the_loss_scale_it_recommends(name: str) -> None:
    policy = Policy(name)
    model = gpt()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = mpcore.MixedPrecisionOptimizer(inner, policy.loss_scale())
    policy.apply(model, optimizer)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(tokens()).view(-1, 11), tokens().view(-1))
        optimizer.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert loss.dtype == F32
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", MIXED)
def test_mixed_policy_computes_what_autocast_computes(name: str) -> None:
    model = gpt()
    with torch.autocast("cpu", TABLE[name][1]):
        expected = model(tokens())
    assert torch.equal(Policy(name).apply(model)(tokens()), expected.float())
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", CAST)
def test_16_bit_policy_computes_what_a_cast_model_computes(name: str) -> None:
    expected = cast_model(gpt(), TABLE[name][0])(tokens())
    assert torch.equal(Policy(name).apply(gpt())(tokens()), expected.float())


def test_float32_policy_changes_no_bits() -> None:
    model = gpt()
    expected = model(tokens())
    assert torch.equal(Policy("float32").apply(model)(tokens()), expected)


@pytest.mark.parametrize("name", [*MIXED, *CAST])
def test_output_dtype_equal_to_compute_dtype_leaves_results_as_they_come(name: str) -> None:
    policy = Policy(name, output_dtype=TABLE[name][1])
    assert policy.apply(gpt())(tokens()).dtype == TABLE[name][1]
    assert policy.apply(gpt(), overrides={"lm_head": "float32"})(tokens()).dtype == F32


@pytest.mark.parametrize("name", TABLE)
def test_autocast_computes_in_16_bits_for_mixed_policies_only(name: str) -> None:
    a = torch.ones(2, 2)
    expected = TABLE[name][1] if name in MIXED else F32
    with Policy(name).autocast("cpu"):
        assert (a @ a).dtype == expected
    with torch.autocast("cpu", B16), Policy(name).autocast("cpu"):
        assert (a @ a).dtype == expected


def test_mixed_policy_leaves_autocast_when_the_model_raises() -> None:
    model = Policy("mixed_bfloat16").apply(gpt(), overrides={"lm_head": "float32"})
    with pytest.raises(IndexError):
        model(tokens() + 100)
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", B16):
        with pytest.raises(RuntimeError, match="shape"):
            model.lm_head(torch.ones(3, 3))
        assert torch.is_autocast_enabled("cpu")
    assert model(tokens()).dtype == F32


def test_nested_and_repeated_use_of_a_mixed_module_restores_autocast() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, depth: int) -> torch.Tensor:
            return self(x, depth - 1) if depth else self.linear(x)

    model = Policy("mixed_bfloat16", output_dtype=B16).apply(Recursive())
    assert model(torch.ones(1, 4), 3).dtype == B16
    assert not torch.is_autocast_enabled("cpu")


def test_modules_without_weights_autocast_on_the_device_of_their_inputs() -> None:
    class Product(nn.Module):
        def forward(self, a: torch.Tensor, *, b: torch.Tensor) -> torch.Tensor:
            return a @ b

    policy, a = Policy("mixed_bfloat16", output_dtype=B16), torch.ones(2, 2)
    assert policy.apply(Product())(a, b=a).dtype == B16
    kept = nn.ModuleDict({"product": Product()})
    policy.apply(kept, overrides={"product": "float32"})
    with torch.autocast("cpu", B16):
        assert kept["product"](a.bfloat16(), b=a).dtype == F32


def test_earlier_hooks_run_under_autocast_and_errors_before_it_are_kept() -> None:
    seen: list[bool] = []

    def see(module: nn.Module, args: Any) -> None:
        seen.append(torch.is_autocast_enabled("cpu"))

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyError

    model = nn.Linear(2, 2)
    model.register_forward_pre_hook(see)
    Policy("mixed_bfloat16").apply(model)
    model(torch.ones(1, 2))
    assert seen == [True]
    model.register_forward_pre_hook(fail, prepend=True)  # comes before autocast is entered
    with pytest.raises(KeyError):
        model(torch.ones(1, 2))
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", MIXED)
def test_overrides_reach_modules_in_a_list_and_without_weights(name: str) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Softmax(-1)])
            self.last = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            y = self.last(x)
            return [y, self.layers[0](y), self.layers[1](y)]

    policy = Policy(name, output_dtype=TABLE[name][1])
    model = policy.apply(Listed(), overrides={"layers": "float32"})
    assert [y.dtype for y in model(torch.ones(1, 4))] == [TABLE[name][1], F32, F32]


@pytest.mark.parametrize("name", TABLE)
def test_a_model_with_a_policy_can_be_copied_and_pickled(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    Policy(name).apply(model, overrides={"2": "float32"})
    x = torch.randn(3, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert not torch.is_autocast_enabled("cpu")


# PyTorch compiles the hooks of the outermost module by themselves, and then looks at `.grad`
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("name", ["mixed_bfloat16", "float16"])
def test_a_compiled_model_computes_the_same(name: str) -> None:
    model = Policy(name).apply(gpt(blocks=1), overrides={"lm_head": "float32"})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name not in MIXED)
    assert torch.equal(compiled(tokens()), model(tokens()))
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_inside_a_compiled_function_leaves_its_graph_whole() -> None:
    def square(a: torch.Tensor) -> torch.Tensor:
        with Policy("mixed_bfloat16").autocast("cpu"):
            return a @ a

    a = torch.ones(4, 4)
    compiled = torch.compile(square, backend="aot_eager", fullgraph=True)
    assert compiled(a).dtype == B16


@pytest.mark.parametrize("name", TABLE)
def test_applying_a_policy_twice_is_applying_it_once(name: str) -> None:
    model = Policy(name).apply(gpt(), overrides={"lm_head": "float32"})
    before, hooks, result = snapshot(model), hook_count(model), model(tokens())
    Policy(name).apply(model, overrides={"lm_head": "float32"})
    assert unchanged(model, before)
    assert hook_count(model) == hooks
    assert torch.equal(model(tokens()), result)


def test_a_part_of_a_model_can_have_a_policy_of_its_own() -> None:
    model = gpt()
    Policy("mixed_bfloat16").apply(model.blocks[0])
    Policy("float32").apply(model)
    with Recorder() as recorder:
        model(tokens())
    assert [dtype for _, dtype in recorder.seen] == [B16] * 5 + [F32] * 6


def test_policies_are_values() -> None:
    policy = Policy("mixed_float16")
    assert policy == Policy("mixed_float16")
    assert hash(policy) == hash(Policy("mixed_float16"))
    assert policy != Policy("mixed_float16", output_dtype=F16)
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert "mixed_float16" in repr(policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.name = "float32"  # type: ignore[misc]
