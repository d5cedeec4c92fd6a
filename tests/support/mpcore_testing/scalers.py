"""Iterations with a GradScaler, of ours or of torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape, dtype=dtype))


def train(scaler: Any, optimizer: Any, param: nn.Parameter, factors: list[float]) -> None:
    for factor in factors:
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
