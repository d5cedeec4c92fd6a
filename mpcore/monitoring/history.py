"""The last steps, kept on the device: added to without a sync, read with one."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from mpcore.monitoring.verdicts import Past


class History:
    """The last steps.

    Args:
        window: How many.
        device: Where the loss scale is.
    """

    def __init__(self, window: int, device: torch.device) -> None:
        self.steps = 0
        self._device = device
        # scale, found_inf, norm, whether the loss is known, loss: float64
        self._rows: deque[Tensor] = deque(maxlen=window)

    def add(self, scale: Tensor, found_inf: Tensor, norm: Tensor, loss: Tensor | None) -> None:
        """Adds a step; no host sync.

        Args:
            scale: 0-d, of the step.
            found_inf: 0-d, not 0 if it was skipped.
            norm: 0-d, of the unscaled gradients.
            loss: 0-d, before scaling, if it is known.
        """
        none = torch.zeros((), dtype=torch.float64, device=self._device)
        known = none if loss is None else torch.ones_like(none)
        values = (scale, (found_inf != 0), norm, known, none if loss is None else loss)
        row = [
            value.detach().to(self._device, torch.float64, non_blocking=True) for value in values
        ]
        self._rows.append(torch.stack(row))
        self.steps += 1

    def read(self) -> list[tuple[Past, float | None]]:
        """Returns the steps, oldest first, each with its loss if that is known; syncs once."""
        rows = torch.stack(list(self._rows)).tolist() if self._rows else []
        return [
            (Past(scale, bool(skipped), norm), loss if known else None)
            for scale, skipped, norm, known, loss in rows
        ]
