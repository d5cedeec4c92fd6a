"""The sums of one step: what several backward passes have left, and what ranks make of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mpcore.backends import Backend
from mpcore.base import ParameterSet
from mpcore.engine.accumulation import Accumulation
from mpcore.engine.gradients import StepGradients
from mpcore.engine.watcher import Watcher
from mpcore.masters import Accumulated, Masters
from mpcore.ranks import Agreement


class StepSums:
    """Sums that wait for a step, if there are any.

    Args:
        masters: Where the masters are.
        backend: Unscales.
    """

    def __init__(self, masters: Masters, backend: Backend) -> None:
        self._masters = masters
        self._backend = backend
        self._sums: Accumulation | None = None
        self.watcher: Watcher | None = None

    @property
    def exist(self) -> bool:
        """Whether gradients were added up for the next step."""
        return self._sums is not None

    @property
    def torn(self) -> bool:
        """Whether an exception left a part of a pass in them."""
        return self._sums is not None and self._sums.torn

    def add(self, params: Sequence[Tensor], scale: Tensor, loss: str, wants_largest: bool) -> None:
        """Adds gradients and drops them; no host sync.

        Args:
            params: Those that have a gradient.
            scale: 0-d float32, of their loss.
            loss: Its name.
            wants_largest: Whether its scale wants the largest gradient.
        """
        self._masters.create_for(params)
        if self.watcher is not None:
            self.watcher.see_pass(params, scale, loss)
        if self._sums is None:
            self._sums = Accumulation(self._masters, self._backend)
        self._sums.add(params, scale.reciprocal(), loss, wants_largest)

    def so_far(self) -> Accumulated | None:
        """Returns what there is, not copied."""
        return None if self._sums is None else self._sums.so_far()

    def resume(self, accumulated: Accumulated | None) -> None:
        """Goes on from what was added up elsewhere."""
        if accumulated is not None:
            self._sums = Accumulation(self._masters, self._backend, accumulated)

    def meet(self, every: Sequence[Tensor], agreement: Agreement | None) -> ParameterSet:
        """Returns the parameters that have a sum, after ranks made sums of copies their mean.

        Args:
            every: All of the optimizer.
            agreement: By whom; None: there are no other ranks.
        """
        sums = {} if self._sums is None else self._sums.sums
        if agreement is not None:
            agreement.average_(sums, every)
        return ParameterSet(param for param in every if param in sums)

    def hand_over(self, gradients: StepGradients) -> None:
        """Makes them the gradients of a step; then there are none."""
        if self._sums is not None:
            gradients.take_sums(self._sums.so_far())
            self._sums.hand_over()
        self._sums = None

    def drop(self) -> None:
        """Drops them."""
        self._sums = None
