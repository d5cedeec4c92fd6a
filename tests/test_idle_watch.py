"""An optimizer whose parameters nobody trains any more is told of, once."""

from __future__ import annotations

import warnings
from typing import Any

import mpcore
import pytest
import torch
from mpcore.engine.idle_watch import MANY
from torch import nn

from mpcore_testing.engines import Engine


def made(engine: Engine) -> tuple[nn.Linear, Any]:
    model = nn.Linear(2, 1).half()
    return model, engine.wrap(torch.optim.SGD(model.parameters(), lr=0.1), mpcore.NoLossScale())


def step(model: nn.Linear, optimizer: Any, how: str) -> None:
    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2).half()).float().sum()
        optimizer.backward(loss)
        return loss

    if how == "closure":
        optimizer.step(evaluate)
    else:
        evaluate()
        optimizer.step()


@pytest.mark.parametrize("how", ["step", "closure"])
def test_a_model_whose_parameters_were_replaced_is_told_of_once(engine: Engine, how: str) -> None:
    model, optimizer = made(engine)
    step(model, optimizer, how)
    optimizer.zero_grad()
    model.weight, model.bias = (nn.Parameter(p.detach().clone()) for p in model.parameters())
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for count in range(1, 2 * MANY + 1):
            step(model, optimizer, how)
            assert len(heard) == (count >= MANY)
    assert "none of the 2 parameters of this optimizer has had a gradient in 8" in str(
        heard[0].message
    )


def test_a_gradient_now_and_then_is_enough(engine: Engine) -> None:
    model, optimizer = made(engine)
    for _ in range(3):
        for _ in range(MANY - 1):
            optimizer.step()  # warnings are errors here
        step(model, optimizer, "step")
        optimizer.zero_grad()
