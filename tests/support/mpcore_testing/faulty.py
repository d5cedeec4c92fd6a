"""A model in float16 that faults can be put into, its batches and its loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """`x @ w.T + b` without a matrix product, which is slow in 16 bits on some CPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * self.weight).sum(-1) + self.bias


class Model(nn.Module):
    """Three layers in float16 with a BatchNorm in float32 between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = Layer(), Layer(), Layer()
        self.norm = nn.BatchNorm1d(4)
        self.blown_up: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "second", "third"):
            x = getattr(self, name)(x.half())
            if name != "third":
                x = torch.tanh(x)
            if self.blown_up == name:
                x = x + torch.tensor([torch.inf, 0.0, 0.0, 0.0]).half()
            if name == "second":
                x = self.norm(x.float())
        return x


def batch(seed: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).half()


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().mean()
