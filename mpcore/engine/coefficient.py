"""What stored gradients still have to be multiplied by: unscaling and clip in one number."""

from __future__ import annotations

import torch
from torch import Tensor

from mpcore.backends import Inspection


class Coefficient:
    """1 / loss_scale at first; clipping multiplies it, and it is 1 once it was applied.

    The first look at the gradients can take the reciprocal on the way, which saves a launch.

    Args:
        given: 0-d float32. What unscales.
        inverted: Whether `given` is the reciprocal of that: the loss scale itself, which must not
            change before a look, `now` or `unscale`.

    Attributes:
        pending: Whether stored gradients have yet to be multiplied.

    Example:
        >>> coefficient = Coefficient(torch.tensor(8.0), inverted=True)
        >>> coefficient.now.item(), coefficient.is_first
        (0.125, True)
    """

    def __init__(self, given: Tensor, inverted: bool) -> None:
        self.pending = True
        self._given = given
        self._inverted = inverted
        self._clipped: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._given.device

    @property
    def is_first(self) -> bool:
        """Whether it is nothing but what unscales."""
        return self.pending and self._clipped is None

    @property
    def unscale(self) -> Tensor:
        """1 / loss_scale as it was at first: 0-d float32."""
        if self._inverted:
            self._given, self._inverted = self._given.reciprocal(), False
        return self._given

    @property
    def now(self) -> Tensor:
        """What stored gradients have to be multiplied by: 0-d float32."""
        if not self.pending:
            return torch.ones_like(self._given)
        return self.unscale if self._clipped is None else self._clipped

    def to_look_with(self, device: torch.device) -> tuple[Tensor, bool]:
        """Returns `now` or its reciprocal for a backend's `inspect`, and whether it is that."""
        if self.is_first and self._inverted and device == self.device:
            return self._given, True
        return self.now.to(device, non_blocking=True), False

    def note_look(self, found: Inspection, inverted: bool) -> None:
        """Takes the reciprocal that a look has found."""
        if inverted:
            self._given, self._inverted = found.unscale, False

    def spend(self) -> None:
        """Notes that gradients were multiplied: 1 from now on, and `unscale` is settled."""
        self._given, self._inverted = self.unscale, False
        self.pending = False

    def clip(self, clipped: Tensor) -> None:
        """Takes what has to be multiplied by from now on."""
        self._clipped, self.pending = clipped, True
