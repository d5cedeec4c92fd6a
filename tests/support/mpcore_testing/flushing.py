"""A network whose float16 gradients flush if its loss is made tiny."""

from __future__ import annotations

from typing import Any

import mpcore
import torch
from torch import Tensor, nn

from mpcore_testing.engines import Engine

SAYS = "^float16 gradients flush to 0"
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


class Net:
    """A float16 network with a float32 norm, whose loss may be made tiny."""

    def __init__(self, engine: Engine, scale: Any = None, dtype: torch.dtype = HALF) -> None:
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 32).to(dtype), nn.Linear(32, 4).to(dtype)
        self.norm = nn.LayerNorm(32)
        self.model = nn.ModuleList([self.first, self.norm, self.last])
        inner = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.optimizer = engine.wrap(inner, scale or mpcore.NoLossScale())
        self.passes = 0

    def loss(self, size: float = 1.0) -> Tensor:
        self.passes += 1
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(self.passes))
        hidden = self.first(x.to(self.first.weight.dtype)).relu()
        hidden = self.norm(hidden.float()).to(self.last.weight.dtype)
        return self.last(hidden).float().square().mean() * size

    def step(self, size: float) -> None:
        self.optimizer.backward(self.loss(size))
        self.optimizer.step()
        self.optimizer.zero_grad()
