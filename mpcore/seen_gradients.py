"""Gradients as a look has seen them: whether somebody has written to them since."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import is_

from torch import Tensor

from mpcore._bulk import writes_to


class SeenGradients:
    """Gradients that were looked at and are not shown; nothing here syncs with the host.

    Args:
        params: Whose they are.
        grads: As they are now.
    """

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self._seen = list(zip(params, grads, writes_to(grads), strict=True))

    def differ_from(self, grads: Sequence[Tensor]) -> bool:
        """Whether anybody wrote to them, or put others in their place.

        Args:
            grads: Those of the same parameters now.
        """
        if not all(map(is_, grads, (grad for _, grad, _ in self._seen))):
            return True
        return writes_to(grads) != [writes for _, _, writes in self._seen]

    def keep(self, params: Collection[Tensor]) -> None:
        """Forgets those of parameters that are not among these."""
        self._seen = [seen for seen in self._seen if seen[0] in params]
