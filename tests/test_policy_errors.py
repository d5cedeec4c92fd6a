"""Policies on bad input: one clear error, and nothing has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mpcore.errors import ArgumentError, ArgumentTypeError, StageError
from mpcore.policy import Policy
from torch import nn

from mpcore_testing.models import gpt, hook_count, snapshot, unchanged

NAMES = ["float32", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16"]


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (("fp16",), ArgumentError, "mixed_bfloat16, float16, bfloat16, got 'fp16'"),
        ((torch.float16,), ArgumentTypeError, "got dtype"),
        (("float16", "float32"), ArgumentTypeError, "output_dtype: .* got str"),
        (("float16", torch.int8), ArgumentError, "output_dtype: .* got torch.int8"),
    ],
)
def test_impossible_policies_raise(
    arguments: tuple[Any, ...], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        Policy(*arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("arguments", "overrides", "kind", "text"),
    [
        (("optimizer",), None, ArgumentTypeError, "Wrap it first"),
        ((), ["lm_head"], ArgumentTypeError, "overrides: .* got list"),
        ((), {"lm_head": "bfloat16"}, ArgumentError, "'lm_head', got 'bfloat16'"),
        ((), {"lm_haed": "float32"}, ArgumentError, "'lm_haed'"),
    ],
)
def test_bad_arguments_to_apply_raise_and_change_nothing(
    name: str,
    arguments: tuple[Any, ...],
    overrides: Any,
    kind: type[Exception],
    text: str,
) -> None:
    model = gpt()
    before = snapshot(model)
    with pytest.raises(kind, match=text):
        Policy(name).apply(model, *arguments, overrides=overrides)
    assert unchanged(model, before)
    assert hook_count(model) == 0


def test_something_else_than_a_module_raises() -> None:
    model: Any = "model"
    with pytest.raises(ArgumentTypeError, match="model: "):
        Policy("float32").apply(model)


@pytest.mark.parametrize(
    ("name", "overrides"), [("float32", None), ("mixed_float16", {"wte": "float32"})]
)
def test_another_policy_on_the_same_model_raises(
    name: str, overrides: dict[str, str] | None
) -> None:
    model = Policy("mixed_float16").apply(gpt())
    hooks = hook_count(model)
    with pytest.raises(StageError, match="mixed_float16"):
        Policy(name).apply(model, overrides=overrides)
    assert hook_count(model) == hooks


@pytest.mark.parametrize("name", NAMES)
def test_the_inside_of_an_attention_cannot_be_overridden_alone(name: str) -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(ArgumentError, match="Keep 'self_attn' instead"):
        Policy(name).apply(model, overrides={"self_attn.out_proj": "float32"})
    assert hook_count(model) == 0
