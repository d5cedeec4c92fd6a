"""An optimizer whose passes have given gradients and losses, and its monitor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mpcore
import torch
from torch import Tensor, nn

from mpcore_testing.engines import Engine

SCALE = 2.0**10


class Training:
    """One float16 weight of 64 values and a float32 one of 8, whose gradients are given."""

    def __init__(self, engine: Engine, rule: Any = None, every: int = 1, **settings: Any) -> None:
        self.half = nn.Parameter(torch.linspace(-1, 1, 64).half())
        self.wide = nn.Parameter(torch.zeros(8))
        named = [("half", self.half), ("wide", self.wide)]
        rule = mpcore.StaticLossScale(SCALE) if rule is None else rule
        self.optimizer = engine.wrap(torch.optim.SGD(named, lr=1e-3), rule)
        self.records: list[Any] = []
        self.monitor = mpcore.Monitor(
            self.optimizer, every=every, sinks=[self.records.append], **settings
        )

    def micro_batch(self, grad: Tensor, loss: float = 1.0, *, added: bool = True) -> None:
        """A pass with an unscaled gradient of the float16 weight."""
        scaled = self.optimizer.scale(torch.tensor(loss))
        factor = float(scaled) / loss if loss and math.isfinite(loss) else SCALE
        for param, value in ((self.half, grad), (self.wide, grad[:8])):
            new = (value * factor).to(param.dtype)
            param.grad = new if param.grad is None else param.grad + new
        if added:
            self.optimizer.accumulate()

    def step(self, losses: Sequence[float], bad: int | None = None, **options: bool) -> Any:
        """A step of so many passes, of which one may overflow; returns the report."""
        for number, loss in enumerate(losses):
            grad = noise(number)
            if number == bad:
                grad[3] = 1e9
            self.micro_batch(grad, loss, **options)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.monitor.report()

    @property
    def reading(self) -> Any:
        return self.monitor.reading


def noise(seed: int) -> Tensor:
    values = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    return values * 10.0 ** -torch.linspace(0, 9, 64)
