"""Steps of both paths that an exception ends, and optimizers of a chain that are stepped alone."""

from __future__ import annotations

import copy
from typing import Any

import mpcore
import pytest
import torch
from mpcore.errors import StageError

from mpcore_testing.bits import bits
from mpcore_testing.mixed_twins import GENERAL, SCALE, Twins, backward, params, weights


class Moody(torch.optim.SGD):
    """Raises where it is told to: before its first write, or after it."""

    raises = ""

    def step(self, closure: Any = None) -> Any:
        if self.raises == "before":
            raise KeyError("before any write")
        result = super().step(closure)
        if self.raises == "after":
            raise KeyError("after a write")
        return result


def chain_of(seed: int = 0) -> tuple[Moody, mpcore.MixedPrecisionOptimizer]:
    general = Moody(weights(seed), lr=0.1, momentum=0.9)
    adamw = torch.optim.AdamW(weights(seed + 1), lr=0.01)
    chain = mpcore.optim.ChainedOptimizer(general, adamw)
    optimizer = mpcore.MixedPrecisionOptimizer(chain, SCALE)
    assert [path.path for path in optimizer.path] == ["general", "fused"]
    return general, optimizer


def test_an_exception_after_the_first_write_has_to_be_loaded_over() -> None:
    general, optimizer = chain_of()
    backward(optimizer, 0)
    optimizer.step()
    optimizer.zero_grad()
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        values = [param.clone() for param in params(optimizer)]
    backward(optimizer, 1)
    general.raises = "after"
    with pytest.raises(KeyError, match="after a write"):
        optimizer.step()
    general.raises = ""
    for act in (optimizer.step, optimizer.state_dict):
        with pytest.raises(StageError, match="expected whole masters"):
            act()
    optimizer.zero_grad()
    with torch.no_grad():
        for param, value in zip(params(optimizer), values, strict=True):
            param.copy_(value)
    optimizer.load_state_dict(saved)
    _, twin = chain_of()
    backward(twin, 0)
    twin.step()
    twin.zero_grad()
    for each in (optimizer, twin):
        backward(each, 1)
        each.step()
    for mine, theirs in zip(params(optimizer), params(twin), strict=True):
        assert torch.equal(bits(mine), bits(theirs))


def test_an_exception_before_the_first_write_leaves_gradients_and_the_step_before() -> None:
    """torch's own optimizers count their writes, so that a step that has none can be repeated."""
    twins = Twins("adamw")
    twins.pass_(0)
    twins.each(lambda optimizer: optimizer.step())
    twins.each(lambda optimizer: optimizer.zero_grad())
    twins.pass_(1)
    group = twins.mixed.param_groups[GENERAL]
    rate, group["lr"] = group["lr"], torch.tensor(0.01)  # which foreach does not take
    grads = [param.grad for param in params(twins.mixed)]
    values = [param.grad.clone() for param in params(twins.mixed)]  # type: ignore[union-attr]
    with pytest.raises((RuntimeError, ValueError), match="lr as a Tensor"):
        twins.mixed.step()
    for param, grad, value in zip(params(twins.mixed), grads, values, strict=True):
        assert param.grad is grad
        assert torch.equal(bits(grad), bits(value))
    group["lr"] = rate
    twins.each(lambda optimizer: optimizer.step())
    twins.check()


def test_a_direct_step_of_an_optimizer_in_a_chain_is_refused() -> None:
    general, optimizer = chain_of()
    for part in (general, *optimizer.inner.optimizers, optimizer.inner):  # type: ignore[attr-defined]
        with pytest.raises(StageError, match="expected a step of the MixedPrecisionOptimizer"):
            part.step()
        with pytest.raises(StageError, match="state_dict"):
            part.state_dict()
