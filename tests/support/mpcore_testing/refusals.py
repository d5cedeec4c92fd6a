"""Weights, an optimizer and bitwise pictures of both, for tests of what is refused."""

from __future__ import annotations

from typing import Any

import mpcore
import torch
from torch import Tensor, nn

from mpcore_testing.engines import Engine

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SCALE = mpcore.DynamicLossScale(init=2.0**8, growth_interval=3)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.1)


def weights(dtypes: Any = DTYPES) -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 2, 6).reshape(2, 3).to(dtype)) for dtype in dtypes]


def make(engine: Engine, scale: Any = SCALE, steps: int = 0) -> tuple[list[nn.Parameter], Any]:
    params = weights()
    optimizer = engine.wrap(adamw(params), scale)
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(loss_of(params))
        optimizer.step()
    return params, optimizer


def loss_of(params: list[nn.Parameter]) -> Tensor:
    return torch.stack([p.float().square().sum() for p in params]).sum()


def frozen(value: Any) -> Any:
    """Any nested value with tensors as dtype, shape and bytes, and parameters as identities."""
    if isinstance(value, Tensor):
        if value.device.type == "meta":
            return "meta", value.dtype, value.shape
        raw = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), raw
    if isinstance(value, dict):
        return {id(k) if isinstance(k, Tensor) else k: frozen(v) for k, v in value.items()}
    return [frozen(item) for item in value] if isinstance(value, (list, tuple)) else value


def snapshot(params: list[nn.Parameter], optimizer: Any) -> Any:
    """Weights, gradients, groups and all state of an optimizer, wrapped or not."""
    groups = [
        {**group, "params": list(map(id, group["params"]))} for group in optimizer.param_groups
    ]
    found = [[(p, p.grad, p.requires_grad) for p in params], groups, dict(optimizer.state)]
    if isinstance(optimizer, mpcore.MixedPrecisionOptimizer):
        inner = optimizer.inner
        found += [dict(inner.state), optimizer.state_dict()["mpcore"], id(inner.param_groups)]
    return frozen(found)


def assert_usable(params: list[nn.Parameter], optimizer: Any) -> None:
    """A correct step still works after the refused one."""
    optimizer.zero_grad()
    before, steps = frozen(params), optimizer.steps
    optimizer.backward(loss_of(params))
    optimizer.step()
    assert optimizer.steps == steps + 1
    assert frozen(params) != before
