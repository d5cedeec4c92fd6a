"""A module that writes to a buffer of its own in each forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Update = Callable[[nn.Module, Tensor], None]
ONES = torch.ones(4)


class Inner(nn.Module):
    """Has a linear layer and a buffer of any name, which it updates in some way in each pass."""

    def __init__(self, first: Tensor, update: Update, persistent: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("zorp", first.clone(), persistent=persistent)
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        with torch.no_grad():
            self.update(self, x.detach())
        return y
