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
        >>> losses.see(torch.tensor(0.5), ""), losses.see([torch.ones(2)], "other")
        (False, False)
        >>> losses.taken(None), losses.taken(None)
        ([('', tensor(0.5000, dtype=torch.float64)), ('other', None)], [])
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: list[tuple[str, Tensor | None]] = []
        self._earlier: Tensor | None = None  # of evaluations before, one that is not finite if any
        self._collected = False

    @property
    def are_any(self) -> bool:
        """Whether there is one, of the evaluation that is going on."""
        return bool(self._seen) and not self._collected

    def note_collected(self) -> None:
        """Notes that gradients were collected: losses that follow are of another evaluation.

        Of a closure, or of the second call of a step of two. They take the place of those before,
        with which they do not add up; but one that was not finite is not forgotten.
        """
        self._collected = True

    def see(self, outputs: Any, name: str) -> bool:
        """Adds the loss of a pass, unknown if it is no tensor of one element.

        Returns:
            Whether it is the first of another evaluation.
        """
        loss, anew = None, self._collected
        if isinstance(outputs, Tensor) and outputs.numel() == 1:
            loss = outputs.detach().reshape(())
            # a copy: whoever adds losses up may do so in place
            loss = loss.to(self._device, torch.float64, non_blocking=True, copy=True)
        if anew:
            self._pass_over()
        self._seen.append((name, loss))
        return anew

    def _pass_over(self) -> None:
        for _, loss in self._seen:
            if loss is not None:
                before = loss if self._earlier is None else self._earlier
                self._earlier = torch.where(before.isfinite(), loss, before)
        self._seen, self._collected = [], False

    def clear(self) -> None:
        """Forgets them."""
        self._seen, self._earlier, self._collected = [], None, False

    def taken(self, added: Accumulated | None) -> list[tuple[str, Tensor | None]]:
        """Returns name and loss of each pass, None if it is not known, and forgets them.

        Args:
            added: What passes have added up, some of them maybe before a checkpoint was loaded.
        """
        seen, earlier = self._seen, self._earlier
        self.clear()
        name, loss = seen[0] if seen else ("", None)
        if earlier is not None and loss is not None:
            seen[0] = name, torch.where(earlier.isfinite(), loss, earlier)
        passes = [] if added is None else added.micro_batches
        before = passes[: max(0, len(passes) - len(seen))]
        return [*((one.loss, None) for one in before), *seen]
