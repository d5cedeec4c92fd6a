"""The last steps in a ring buffer on the device: written without a sync, read with one."""

from __future__ import annotations

import torch
from torch import Tensor

from mpcore.monitoring.verdicts import Past

_COLUMNS = 5  # scale, found_inf, norm, whether the loss is known, loss


class History:
    """The last steps.

    Args:
        window: How many.
        device: Where the loss scale is.
    """

    def __init__(self, window: int, device: torch.device) -> None:
        self.steps = 0
        self._rows = torch.full((window, _COLUMNS), torch.nan, dtype=torch.float64, device=device)

    def add(self, scale: Tensor, found_inf: Tensor, norm: Tensor, loss: Tensor | None) -> None:
        """Adds a step; no host sync.

        Args:
            scale: 0-d, of the step.
            found_inf: 0-d, not 0 if it was skipped.
            norm: 0-d, of the unscaled gradients.
            loss: 0-d, before scaling, if it is known.
        """
        home = self._rows.device
        none = torch.zeros_like(self._rows[0, 0])
        known = none if loss is None else torch.ones_like(none)
        values = (scale, (found_inf != 0), norm, known, none if loss is None else loss)
        row = [v.detach().reshape(()).to(home, torch.float64, non_blocking=True) for v in values]
        self._rows[self.steps % len(self._rows)] = torch.stack(row)
        self.steps += 1

    def read(self) -> list[tuple[Past, float | None]]:
        """Returns the steps, oldest first, each with its loss if that is known; syncs once."""
        size = len(self._rows)
        rows = self._rows.tolist()
        if self.steps > size:
            cut = self.steps % size
            rows = rows[cut:] + rows[:cut]
        return [
            (Past(scale, bool(skipped), norm), loss if known else None)
            for scale, skipped, norm, known, loss in rows[: min(self.steps, size)]
        ]
