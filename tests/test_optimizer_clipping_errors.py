"""`grads` and `clip_grad_norm_` asked for at the wrong moment or with a bad number."""

from __future__ import annotations

from typing import Any

import mpcore
import pytest
import torch
from mpcore.errors import ArgumentError, ArgumentTypeError, StageError
from torch import nn

from mpcore_testing.engines import Engine


def scaled(engine: Engine) -> tuple[list[nn.Parameter], mpcore.MixedPrecisionOptimizer]:
    """Parameters with scaled gradients."""
    params = [nn.Parameter(torch.zeros(4).to(dtype)) for dtype in (torch.float16, torch.float32)]
    optimizer = engine.wrap(torch.optim.SGD(params, lr=0.5), mpcore.StaticLossScale(2.0**8))
    optimizer.scale(torch.ones(()))
    for param in params:
        param.grad = torch.full_like(param, 2.0**8)
    return params, optimizer


def test_grads_needs_unscale_first_in_the_same_step(engine: Engine) -> None:
    params, optimizer = scaled(engine)
    message = r"^grads\(\): expected a call after unscale_\(\)"
    with pytest.raises(StageError, match=message):
        optimizer.grads()
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(StageError, match=message):
        optimizer.grads()
    optimizer.step()
    with pytest.raises(StageError, match=message):
        optimizer.grads()
    assert params[0].grad is not None


@pytest.mark.parametrize(
    ("max_norm", "error"),
    [
        *((value, ArgumentError) for value in (0, -1.0, float("nan"), float("-inf"))),
        *((value, ArgumentTypeError) for value in ("1", None, True)),
    ],
)
def test_a_bad_max_norm_is_refused_and_named(
    engine: Engine, max_norm: Any, error: type[Exception]
) -> None:
    params, optimizer = scaled(engine)
    with pytest.raises(error, match=r"^max_norm: expected a number.*, got"):
        optimizer.clip_grad_norm_(max_norm)
    assert params[0].grad is not None
    optimizer.unscale_()


def test_arguments_as_for_torchs_function_are_answered_and_the_advice_works(engine: Engine) -> None:
    params, optimizer = scaled(engine)
    for rest in ((1.0,), (1.0, 2.0)):
        with pytest.raises(ArgumentTypeError, match=r"write optimizer\.clip_grad_norm_\(1\.0\)"):
            optimizer.clip_grad_norm_(params, *rest)
    for kind in (1.0, float("inf"), "2"):
        with pytest.raises(ArgumentError, match=r"^norm_type: expected 2\.0, got .*grads\(\)"):
            optimizer.clip_grad_norm_(1.0, norm_type=kind)
    optimizer.unscale_()
    grads = optimizer.grads()
    before = torch.stack([grad.abs().max() for grad in grads]).amax()
    torch._foreach_mul_(grads, 0.5 / before)
    assert torch.stack([grad.abs().max() for grad in optimizer.grads()]).amax() <= 0.5 + 1e-6
    optimizer.step()
    assert not optimizer.last_step.skipped
    params, optimizer = scaled(engine)
    optimizer.clip_grad_norm_(1.0, norm_type=2)
    optimizer.step()
