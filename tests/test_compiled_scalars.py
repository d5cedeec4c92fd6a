"""Scalars and sums of the compiled backend: bit for bit what the other backends compute."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import mpcore
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore.backends import _c_inspection, _cpu_inspection, compiled, reference
from mpcore.updates import RULES, Batch, Hyper
from torch import Tensor

from mpcore_testing.bits import same_bits

COUNTS = st.integers(0, 5) | st.integers(0, 2**24)
RATES = st.sampled_from([1e-3, 3e-4, 0.1, 1.0]) | st.floats(1e-10, 10.0)
BETAS = st.floats(0.0, 1.0, exclude_max=True)
DECAYS = st.sampled_from([0.0, 0.01]) | st.floats(0.0, 1.0)


@st.composite
def groups_of(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A param group as the optimizer of a rule makes it."""
    weight = [torch.zeros(1)]
    lr, decay, maximize = draw(RATES), draw(DECAYS), draw(st.booleans())
    common = {"lr": lr, "weight_decay": decay, "maximize": maximize}
    made: Any
    if name == "adam":
        make = draw(st.sampled_from([torch.optim.Adam, torch.optim.AdamW]))
        made = make(weight, betas=(draw(BETAS), draw(BETAS)), **common)
    elif name == "sgd":
        nesterov = draw(st.booleans())
        dampening = 0.0 if nesterov else draw(DECAYS)
        momentum = draw(st.floats(0.1, 0.99))
        made = torch.optim.SGD(
            weight, momentum=momentum, dampening=dampening, nesterov=nesterov, **common
        )
    elif name == "adagrad":
        made = torch.optim.Adagrad(weight, lr_decay=draw(DECAYS), **common)
    else:
        made = mpcore.optim.Lion(weight, betas=(draw(BETAS), draw(BETAS)), **common)
    group: dict[str, Any] = made.param_groups[0]
    return group


def batch_of(counts: list[int], groups: list[int], moments: int, *, together: bool) -> Batch:
    masters = [torch.zeros(1) for _ in counts]
    wide = torch.tensor(counts, dtype=torch.float32)
    steps = list(wide.unbind()) if together else [count.clone() for count in wide]
    return Batch(masters, None, [masters] * moments, steps, groups)


@pytest.mark.parametrize("name", list(RULES))
@given(data=st.data())
def test_scalars_have_the_bits_of_the_reference(name: str, data: st.DataObject) -> None:
    rule, groups = RULES[name], data.draw(st.lists(groups_of(name), min_size=1, max_size=3))
    numbers = tuple(rule.numbers(group, group["lr"]) for group in groups)
    lrs = tuple(data.draw(st.none() | RATES.map(torch.tensor)) for _ in groups)
    batches = []
    for _ in range(data.draw(st.integers(1, 3))):
        tensors = data.draw(st.lists(st.tuples(COUNTS, st.integers(0, len(groups) - 1))))
        counts, places = [count for count, _ in tensors], [place for _, place in tensors]
        together = data.draw(st.booleans())
        moments = data.draw(st.sampled_from(rule.moment_counts))
        batches.append(batch_of(counts, places, moments, together=together))
    found = []
    for backend in (reference, compiled):
        plan: Any = backend.plan_update(name, batches)
        backend.prepare_(plan, Hyper(numbers, lrs))
        found.append(plan.scalars)
    assert same_bits(*found)


def test_a_batch_that_counts_no_steps_is_at_its_first() -> None:
    batch = Batch([torch.zeros(2)], None, [], None, [0])
    hyper = Hyper(((0.1, 0.9, 0.0, 0.0, 0.0, 0.0),), (None,))
    plan = compiled.plan_update("sgd", [batch])
    compiled.prepare_(plan, hyper)
    assert plan.scalars is not None
    assert plan.scalars[0][0].tolist()[4] == 1.0  # "first"


def test_groups_that_are_not_there_are_refused() -> None:
    plan = compiled.plan_update("sgd", [Batch([torch.zeros(2)], None, [], None, [7])])
    with pytest.raises(IndexError, match="groups: expected some of 1, got 7"):
        compiled.prepare_(plan, Hyper(((0.1, 0.9, 0.0, 0.0, 0.0, 0.0),), (None,)))


def gradients(seed: int, sizes: list[int], size: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return [
        (torch.randn(n, generator=generator) * size).to(dtypes[i % 3]) for i, n in enumerate(sizes)
    ]


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4])
@pytest.mark.parametrize("sizes", [[], [5], [1, 70_000, 3, 65_536, 200_001, 17]])
def test_sums_in_c_are_what_conclude_says(sizes: list[int], size: float) -> None:
    flat, coefficient = gradients(3, sizes, size), torch.tensor(2.0**-10)
    chunks, sums = _c_inspection._square_sums(flat)
    slow = _cpu_inspection.conclude(flat, chunks, sums, coefficient, 1e-3)
    fast = _c_inspection._summed_up(chunks, sums, len(flat), coefficient, 1e-3)
    assert fast is not None
    names = ("kinds", "first_bad", "square_sum", "found_inf", "grad_norm", "coefficient")
    assert same_bits(*([getattr(found, name) for name in names] for found in (slow, fast)))


@pytest.mark.parametrize("sum_of_squares", [0.0, 2.0**-60, 2.0**120, torch.inf, torch.nan])
def test_sums_that_tell_too_little_are_looked_at_again(sum_of_squares: float) -> None:
    chunks = torch.tensor([[0, 0, 4], [1, 0, 4]])
    sums = torch.tensor([1.0, sum_of_squares], dtype=torch.float64)
    assert _c_inspection._summed_up(chunks, sums, 2, torch.tensor(1.0), 1.0) is None


@pytest.mark.parametrize("coefficient", [2.0**-120, 2.0**127, torch.inf, torch.nan])
def test_coefficients_that_leave_float32_are_looked_at_again(coefficient: float) -> None:
    chunks, sums = torch.tensor([[0, 0, 4]]), torch.tensor([1.0], dtype=torch.float64)
    factor = torch.tensor(coefficient)
    assert _c_inspection._summed_up(chunks, sums, 1, factor, 1.0) is None


@pytest.mark.parametrize("backend", ["compiled", "cpu"])
def test_the_default_device_of_torch_is_nobody_elses_memory(backend: str) -> None:
    def train(where: Any) -> list[Tensor]:
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(3, 4).half()), torch.nn.Parameter(torch.randn(5))]
        adam = torch.optim.AdamW(weights, lr=0.1)
        optimizer = mpcore.MixedPrecisionOptimizer(adam, backend=backend)
        for value in (1.0, torch.inf, 0.5):
            optimizer.scale(torch.ones(()))
            for weight in weights:
                weight.grad = torch.full_like(weight, value)
            with where:
                optimizer.clip_grad_norm_(1.0)
                optimizer.step()
        return [*weights, *(optimizer.state[w]["exp_avg"] for w in weights)]

    assert same_bits(train(nullcontext()), train(torch.device("meta")))
