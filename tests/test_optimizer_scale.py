"""`scale()`: losses of every dtype and nesting, multiplied in float32 or wider."""

from __future__ import annotations

from typing import Any, NamedTuple

import mpcore
import pytest
import torch
from mpcore.errors import ArgumentTypeError, StageError
from torch import Tensor, nn

from mpcore_testing.engines import Engine

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def make(engine: Engine, scale: Any) -> tuple[nn.Parameter, mpcore.MixedPrecisionOptimizer]:
    param = nn.Parameter(torch.ones(3).half())
    return param, engine.wrap(torch.optim.SGD([param], lr=0.5), scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_multiplies_in_float32_or_wider(engine: Engine, dtype: torch.dtype) -> None:
    _, optimizer = make(engine, mpcore.DynamicLossScale())
    for shape in ((), (1,), (2, 2)):
        loss = torch.ones(shape, dtype=dtype, requires_grad=True)
        scaled = optimizer.scale(loss)
        assert scaled.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(scaled, torch.full(shape, 65536.0, dtype=scaled.dtype))
        assert scaled.requires_grad


def test_scale_keeps_the_nesting_of_lists_and_tuples(engine: Engine) -> None:
    _, optimizer = make(engine, mpcore.StaticLossScale(256.0))
    one = torch.ones(())
    scaled = optimizer.scale([one, (2 * one, [3 * one]), ()])
    assert scaled == [256.0, (512.0, [768.0]), ()]
    assert isinstance(scaled[1], tuple)


class Output(NamedTuple):
    loss: Tensor
    auxiliary: Tensor


def test_scale_keeps_named_tuples(engine: Engine) -> None:
    _, optimizer = make(engine, mpcore.StaticLossScale(256.0))
    scaled = optimizer.scale(Output(torch.ones(()), 2 * torch.ones(())))
    assert isinstance(scaled, Output)
    assert (scaled.loss, scaled.auxiliary) == (256.0, 512.0)


@pytest.mark.parametrize("bad", [torch.ones(2, dtype=torch.int64), 1.0, "loss", None, {"a": 1}])
def test_scale_refuses_what_is_no_floating_tensor(engine: Engine, bad: Any) -> None:
    _, optimizer = make(engine, mpcore.StaticLossScale(256.0))
    for outputs in (bad, [torch.ones(()), bad]):
        with pytest.raises(ArgumentTypeError, match=r"^outputs: expected a floating tensor.*, got"):
            optimizer.scale(outputs)


def test_without_a_loss_scale_outputs_are_returned_as_they_are(engine: Engine) -> None:
    _, optimizer = make(engine, mpcore.NoLossScale())
    loss = torch.ones((), dtype=torch.float16)
    assert optimizer.scale(loss) is loss
    assert optimizer.loss_scale == 1.0


@pytest.mark.parametrize("stage", ["unscale_", "clip"])
def test_scale_refuses_more_gradients_once_those_of_the_step_are_unscaled(
    engine: Engine, stage: str
) -> None:
    param, optimizer = make(engine, mpcore.StaticLossScale(256.0))
    optimizer.backward(param.float().sum())
    _ = optimizer.unscale_() if stage == "unscale_" else optimizer.clip_grad_norm_(9.0)
    with pytest.raises(StageError, match=r"^scale\(\): expected .* before unscale_.*zero_grad\(\)"):
        optimizer.backward(param.float().sum())
    assert param.grad.tolist() == [1.0 if stage == "unscale_" else 256.0] * 3
    optimizer.step()
    assert param.grad.tolist() == [256.0] * 3
    optimizer.backward(param.float().sum())


def test_a_float16_loss_costs_one_backoff_from_2_to_16_and_no_more(engine: Engine) -> None:
    param, optimizer = make(engine, mpcore.DynamicLossScale())
    for expected_skips in (1, 1, 1):
        optimizer.zero_grad()
        loss = (param * 2.0**-4).sum()
        assert loss.dtype == torch.float16
        assert torch.isfinite(optimizer.scale(loss))
        # the derivative of a float16 loss is the scale itself in float16, where 2^16 is infinite
        optimizer.backward(loss)
        optimizer.step()
        assert optimizer.skipped_steps == expected_skips
    assert optimizer.loss_scale == 2.0**15
    assert param.tolist() == [1 - 2 * 2.0**-5] * 3


def test_backward_passes_its_options_on(engine: Engine) -> None:
    param, optimizer = make(engine, mpcore.StaticLossScale(256.0))
    other = torch.ones(3, requires_grad=True)
    loss = (param.float() * other).sum()
    optimizer.backward(loss, retain_graph=True, inputs=[param])
    assert other.grad is None
    optimizer.backward(loss, create_graph=False)
    assert param.grad.tolist() == [512.0] * 3
    assert other.grad.tolist() == [256.0] * 3
