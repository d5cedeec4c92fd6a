"""How a fused SGD begins under a GradScaler, and an engine without gradients under another one's.

Torch's side is shown where it is cheap: the comparison fails when torch mends it.
"""

from __future__ import annotations

from typing import Any

import mpcore
import pytest
import torch

from mpcore_testing.bits import same_bits
from mpcore_testing.scalers import train, weight

THEIRS, OURS = torch.amp.GradScaler, mpcore.GradScaler
INF, NAN = float("inf"), float("nan")
HALVES = [torch.float16, torch.bfloat16]


def _fused_sgd(kind: Any, clean: bool, **options: Any) -> tuple[torch.Tensor, ...]:
    """Two clean steps, the first of all skipped unless `clean`, in memory full of rubbish."""
    rubbish = [torch.full((64,), 1e30) for _ in range(50)]
    del rubbish
    param, late = weight(64), weight(3)
    optimizer = torch.optim.SGD([param, late], lr=0.1, momentum=0.9, fused=True, **options)
    scaler = kind("cpu", init_scale=4.0)
    train(scaler, optimizer, param, [1.0, -0.0] if clean else [INF, 1.0, -0.0])
    return param.detach(), optimizer.state[param]["momentum_buffer"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"dampening": 0.5},
        {"dampening": 0.5, "weight_decay": 0.1},
    ],
)
def test_the_momentum_of_a_fused_sgd_begins_with_the_first_step_that_is_taken(
    options: dict[str, Any],
) -> None:
    expected = _fused_sgd(THEIRS, True, **options)
    assert same_bits(_fused_sgd(OURS, True, **options), expected)
    assert all(same_bits(_fused_sgd(OURS, False, **options), expected) for _ in range(10))
    theirs = [_fused_sgd(THEIRS, False, **options) for _ in range(10)]
    assert any(not same_bits(result, expected) for result in theirs)


def test_the_momentum_of_a_fused_sgd_keeps_the_sign_of_zero_and_may_begin_late() -> None:
    param, late = weight(2), weight(2)
    optimizer = torch.optim.SGD([param, late], lr=0.1, momentum=0.9, fused=True)
    scaler = OURS("cpu", init_scale=4.0)
    scaler.scale(param.sum())
    for grads in ([0.0, -0.0], None), ([0.0, -0.0], [1.0, -2.0]):
        param.grad, late.grad = (None if g is None else torch.tensor(g) for g in grads)
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.state[param]["momentum_buffer"].signbit().tolist() == [False, True]
    assert optimizer.state[late]["momentum_buffer"].tolist() == [0.25, -0.5]


@pytest.mark.parametrize("scaler", [None, THEIRS, OURS])
def test_a_wrapped_fused_sgd_has_no_such_momentum_either(scaler: Any) -> None:
    for _ in range(10):
        rubbish = [torch.full((64,), 1e30) for _ in range(50)]
        del rubbish
        param = weight(64)
        optimizer = mpcore.MixedPrecisionOptimizer(
            torch.optim.SGD([param], lr=0.1, momentum=0.9, fused=True), path="general"
        )
        if scaler is not None:
            train(scaler("cpu"), optimizer, param, [INF, 1.0])
        else:
            for factor in (INF, 1.0):
                optimizer.zero_grad()
                optimizer.backward((param * factor).sum())
                optimizer.step()
        assert torch.equal(param.detach(), torch.full((64,), 1 - 0.1))


@pytest.mark.parametrize("kind", [THEIRS, OURS])
@pytest.mark.parametrize("unscale", [False, True])
def test_an_outside_scaler_steps_an_engine_that_has_no_gradient(
    engine: Any, kind: Any, unscale: bool
) -> None:
    """Torch's fused optimizers pass; it hands over the number 0, which is no tensor, as a flag."""
    used, unused = weight(2), [weight(3, dtype=torch.float16), weight(2)]
    optimizer = engine.wrap(torch.optim.AdamW(unused, lr=0.1))
    other = torch.optim.SGD([used], lr=0.5)
    scaler = kind("cpu", init_scale=4.0)
    for number in range(3):
        if number == 1:
            unused[0].grad = torch.full_like(unused[0], 4.0)
        scaler.scale(used.sum()).backward()
        if unscale and unused[0].grad is None:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.step(other)
        scaler.update()
        assert unused[0].tolist() == [1.0 if number == 0 else unused[0][0].item()] * 3
        assert unused[1].tolist() == [1.0, 1.0]
        assert (optimizer.last_step is None) == (number != 1)
        optimizer.zero_grad()
        other.zero_grad()
    assert (optimizer.steps, optimizer.skipped_steps) == (1, 0)
    assert unused[0][0] < 1
    assert used.tolist() == [-0.5, -0.5]
