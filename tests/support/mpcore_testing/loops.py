"""Training loops for `mpcore.compare`."""

from __future__ import annotations

import random
from typing import Any

import mpcore
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def draw() -> tuple[float, float, float]:
    legacy = float(np.random.rand())  # noqa: NPY002 - what many loops still draw from
    return random.random(), legacy, float(torch.rand(()))


def make(lr: float = 0.05) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(32, 8)
    return inputs, inputs.sum(dim=1, keepdim=True).tanh()


def loop(weight: float = 1.0, steps: int = 60, lr: float = 0.05) -> Any:
    """A loop whose loss is multiplied by a weight that its learning rate takes back."""

    def train(run: mpcore.TrainingRun) -> None:
        model, optimizer = run.prepare(*make(lr / weight))
        for _ in range(steps):
            inputs, targets = batch()
            optimizer.backward(F.mse_loss(model(inputs), targets) * weight)
            optimizer.step()
            optimizer.zero_grad()

    return train
