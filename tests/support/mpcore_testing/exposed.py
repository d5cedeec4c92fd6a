"""Parameters and losses of the tests of gradients that `unscale_` shows."""

from __future__ import annotations

from typing import Any

import mpcore
import torch
from torch import Tensor, nn

from mpcore_testing.engines import Engine

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
SCALE = 2.0**6


def parameters() -> list[nn.Parameter]:
    """float16, bfloat16 and float32; one of them transposed in memory."""
    values = torch.linspace(-1, 1, 12).view(4, 3)
    return [
        nn.Parameter(values.to(HALF)),
        nn.Parameter(values.to(BRAIN).t()),
        nn.Parameter(values.clone()),
    ]


def wrapped(engine: Engine, params: list[nn.Parameter], **options: Any) -> Any:
    """Two groups, over a frozen parameter too."""
    frozen = nn.Parameter(torch.ones(2, dtype=HALF), requires_grad=False)
    groups = [{"params": params[:1]}, {"params": [*params[1:], frozen], "lr": 0.25}]
    inner = torch.optim.SGD(groups, lr=0.5, momentum=0.9, weight_decay=0.1)
    return engine.wrap(inner, options.get("scale") or mpcore.StaticLossScale(SCALE))


def loss_of(params: list[nn.Parameter], seed: int, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(p.shape, generator=generator) * size for p in params]
    return torch.stack([(p.float() * n).sum() for p, n in zip(params, noise, strict=True)]).sum()
