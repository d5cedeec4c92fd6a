"""A small float16 model with a float32 norm, an optimizer over its names, and a training loop."""

from __future__ import annotations

from typing import Any

import mpcore
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpcore_testing.engines import Engine

SCALE = mpcore.DynamicLossScale(2.0**8, growth_interval=3)


class Blocks(nn.Module):
    """Three residual layers without matrix products, which are slow in 16 bits on some CPUs."""

    def __init__(self, checkpoints: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.checkpoints = checkpoints

    def block(self, layer: Any, x: Tensor) -> Tensor:
        return x + torch.tanh((x.unsqueeze(-2) * layer.weight).sum(-1) + layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpoints is None:
                x = self.block(layer, x)
            else:
                x = checkpoint(self.block, layer, x, use_reentrant=self.checkpoints)
        return self.norm(x.float())


def make(engine: Engine, checkpoints: bool | None = None, **options: Any) -> tuple[Blocks, Any]:
    model = Blocks(checkpoints).half()
    model.norm.float()
    inner = torch.optim.AdamW(model.named_parameters(), lr=0.05, **options)
    return model, engine.wrap(inner, SCALE)


def train(model: Any, optimizer: Any, seeds: Any, edit: Any = None) -> list[bool]:
    skipped = []
    for seed in seeds:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        if seed == 2:
            x = x * 1e4  # overflows in the backward pass or before it
        optimizer.backward(model(x.half()).square().mean())
        if edit is not None:
            edit(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(optimizer.last_step.skipped)
    return skipped
