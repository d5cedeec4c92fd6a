"""The losses that a GradScaler has scaled, for monitors of the optimizers that it steps."""

from __future__ import annotations

import torch
from torch import Tensor

from mpcore.engine import MixedPrecisionOptimizer, tell_losses


class ScaledLosses:
    """The losses of one iteration, before they were scaled; no host sync."""

    def __init__(self) -> None:
        self._losses: list[Tensor | None] = []
        self._told: set[int] = set()  # ids of optimizers that have heard of them

    def note(self, outputs: object) -> None:
        """Notes what is scaled; only a tensor of one element is known to be a loss."""
        known = isinstance(outputs, Tensor) and outputs.numel() == 1
        # a copy: whoever adds losses up may do so in place
        self._losses.append(outputs.detach().clone() if known else None)  # type: ignore[attr-defined]

    def tell(self, optimizer: torch.optim.Optimizer) -> None:
        """Tells a monitor of an optimizer, once an iteration."""
        if isinstance(optimizer, MixedPrecisionOptimizer) and id(optimizer) not in self._told:
            self._told.add(id(optimizer))
            tell_losses(optimizer, self._losses)

    def clear(self) -> None:
        """Forgets them: the iteration is over."""
        self._losses.clear()
        self._told.clear()
