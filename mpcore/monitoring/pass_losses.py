"""The losses of the backward passes of a step, in order, on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpcore.masters import Accumulated


class PassLosses:
    """Losses before they are scaled. Nothing here syncs with the host.

    Args:
        device: Where they are kept.

    Example:
        >>> losses = PassLosses(torch.device("cpu"))
        >>> losses.see(torch.tensor(0.5), "")
        >>> losses.see([torch.ones(2)], "other")
        >>> losses.taken(None), losses.taken(None)
        ([('', tensor(0.5000, dtype=torch.float64)), ('other', None)], [])
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: list[tuple[str, Tensor | None]] = []

    def see(self, outputs: Any, name: str) -> None:
        """Adds the loss of a pass; what is no tensor of one element is not known."""
        loss = None
        if isinstance(outputs, Tensor) and outputs.numel() == 1:
            loss = outputs.detach().reshape(())
            # a copy: whoever adds losses up may do so in place
            loss = loss.to(self._device, torch.float64, non_blocking=True, copy=True)
        self._seen.append((name, loss))

    def clear(self) -> None:
        """Forgets them."""
        self._seen.clear()

    def taken(self, added: Accumulated | None) -> list[tuple[str, Tensor | None]]:
        """Returns name and loss of each pass, None if it is not known, and forgets them.

        Args:
            added: What passes have added up, some of them maybe before a checkpoint was loaded.
        """
        seen, self._seen = self._seen, []
        passes = [] if added is None else added.micro_batches
        before = passes[: max(0, len(passes) - len(seen))]
        return [*((one.loss, None) for one in before), *seen]
