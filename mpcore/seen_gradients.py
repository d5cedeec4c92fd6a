"""Gradients as a look has seen them: whether somebody has written to them since."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import is_

from torch import Tensor

from mpcore._bulk import with_gradient, writes_to


class SeenGradients:
    """Gradients that were looked at and are not shown; nothing here syncs with the host.

    Args:
        params: Whose they are.
        grads: As they are now.
    """

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self._params = params
        self._grads = grads
        self._writes = writes_to(grads)

    def differ_from(self, grads: Sequence[Tensor]) -> bool:
        """Whether anybody wrote to them, or put others in their place.

        Args:
            grads: Those of the same parameters now.
        """
        return not all(map(is_, grads, self._grads)) or writes_to(grads) != self._writes

    def are_all_of(self, params: Sequence[Tensor]) -> bool:
        """Whether these parameters have these gradients in `p.grad`, as they were, and no others.

        Args:
            params: All there are.
        """
        owners, grads = with_gradient(params)
        same = len(owners) == len(self._params) and all(map(is_, owners, self._params))
        return same and not self.differ_from(grads)

    def keep(self, params: Collection[Tensor]) -> None:
        """Forgets those of parameters that are not among these."""
        kept = [i for i, param in enumerate(self._params) if param in params]
        self._params = [self._params[i] for i in kept]
        self._grads = [self._grads[i] for i in kept]
        self._writes = [self._writes[i] for i in kept]
