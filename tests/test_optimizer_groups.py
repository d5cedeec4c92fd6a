"""`add_param_group`: new weights of every kind join, bad ones are refused without a trace."""

from __future__ import annotations

from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.engines import ENGINES, Engine

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPE_CASES = [
    pytest.param(dtype, engine, id=f"{dtype}-{engine}")
    for engine in ENGINES
    for dtype in engine.dtypes(DTYPES)
]


def weight(dtype: torch.dtype = torch.float16, value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.full((3,), value).to(dtype))


def make(
    engine: Engine, named: bool = False
) -> tuple[nn.Parameter, mpcore.MixedPrecisionOptimizer]:
    first = weight()
    given: Any = [("first", first)] if named else [first]
    inner = torch.optim.SGD(given, lr=0.5, momentum=0.5)
    return first, engine.wrap(inner, mpcore.StaticLossScale(4.0))


def step(optimizer: mpcore.MixedPrecisionOptimizer) -> None:
    optimizer.zero_grad()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.backward(sum((p.to(torch.float32).sum() for p in params), torch.zeros(())))
    optimizer.step()


def seen(optimizer: Any) -> Any:
    """Everything about groups and state that a refused call could have changed."""
    groups = [
        {k: list(map(id, v)) if k == "params" else v for k, v in group.items()}
        for group in optimizer.param_groups
    ]
    state = {
        id(p): {k: v.tolist() if isinstance(v, Tensor) else v for k, v in s.items()}
        for p, s in optimizer.state.items()
    }
    return groups, state, optimizer.state_dict()["mpcore"], len(optimizer.inner.state)


@pytest.mark.parametrize(("dtype", "engine"), DTYPE_CASES)
@pytest.mark.parametrize("trained", [False, True])
def test_a_weight_added_later_trains_as_if_it_had_an_optimizer_of_its_own(
    engine: Engine, dtype: torch.dtype, trained: bool
) -> None:
    _, optimizer = make(engine)
    if trained:
        step(optimizer)
    late, twin = weight(dtype), weight(torch.promote_types(dtype, torch.float32))
    optimizer.add_param_group({"params": [late], "lr": 0.25})
    assert len(optimizer.inner.param_groups) == 2
    reference = torch.optim.SGD([twin], lr=0.25, momentum=0.5)
    for _ in range(3):
        step(optimizer)
        twin.grad = torch.ones_like(twin)
        reference.step()
    master = optimizer.state[late].get("master", late)
    assert engine.agree(master, twin, steps=3)
    assert torch.equal(late, master.to(dtype))
    assert ("master" in optimizer.state[late]) == (late.element_size() == 2)
    assert optimizer.steps == 3 + trained


@pytest.mark.parametrize("form", ["one tensor", "list", "tuple", "generator"])
def test_a_group_may_be_given_in_every_form_that_torch_takes(engine: Engine, form: str) -> None:
    _, optimizer = make(engine)
    late = weight()
    forms = {"one tensor": late, "list": [late], "tuple": (late,), "generator": (p for p in [late])}
    group = {"params": forms[form]}
    optimizer.add_param_group(group)
    assert set(group) == {"params"}
    assert optimizer.param_groups[1]["params"][0] is late
    assert optimizer.param_groups[1]["lr"] == 0.5
    step(optimizer)
    assert late.tolist() == [0.5] * 3


def test_named_parameters_join_under_their_names(engine: Engine) -> None:
    _, optimizer = make(engine, named=True)
    late = weight(torch.float32)
    optimizer.add_param_group({"params": [("late", late)]})
    assert optimizer.param_groups[1]["param_names"] == ["late"]
    optimizer.backward(late.sum() * torch.inf)
    optimizer.step()
    assert optimizer.last_step.overflowed() == ["late"]


def complex_weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, dtype=torch.complex64))


def integer_weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(2).long(), requires_grad=False)


REFUSED: dict[str, tuple[Any, str]] = {
    "a known weight": (lambda old: {"params": [old]}, "once|more than one"),
    "a known weight last": (lambda old: {"params": [weight(), old]}, "once|more than one"),
    "one weight twice": (lambda old: {"params": [weight()] * 2}, "once"),
    "complex": (lambda old: {"params": [complex_weight()]}, "complex64"),
    "integer": (lambda old: {"params": [weight(), integer_weight()]}, "int64"),
    "no leaf": (lambda old: {"params": [weight() * 2]}, "non-leaf"),
    "text": (lambda old: {"params": ["weight"]}, "expected tensors"),
    "a set": (lambda old: {"params": {weight()}}, "order"),
    "names": (lambda old: {"params": [("late", weight())]}, "named|names"),
    "no params": (lambda old: {"lr": 0.1}, '"params"'),
    "a list": (lambda old: [weight()], "expected a dict"),
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_or_the_engine_cannot_take_is_refused_without_a_trace(
    engine: Engine, case: str, trained: bool
) -> None:
    old, optimizer = make(engine)
    if trained:
        step(optimizer)
    before = seen(optimizer)
    group, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.add_param_group(group(old))
    assert seen(optimizer) == before
    assert optimizer.param_groups is optimizer.inner.param_groups
    step(optimizer)


def test_a_group_added_to_the_inner_optimizer_trains_too(engine: Engine) -> None:
    _, optimizer = make(engine)
    late = weight()
    optimizer.inner.add_param_group({"params": [late]})
    step(optimizer)
    assert late.tolist() == [0.5] * 3
    assert optimizer.state[late]["master"].tolist() == [0.5] * 3
