"""Gradients as a look has seen them: whether somebody has written to them since."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from mpcore.base import GradientSet, addresses_of, are_same, with_gradient, writes_to


class SeenGradients:
    """Gradients that were looked at and are not shown; nothing here syncs with the host.

    Args:
        params: Whose they are.
        grads: As they are now.
    """

    def __init__(self, params: Sequence[Tensor], grads: GradientSet) -> None:
        self._params = params
        self._grads = grads
        self._writes = grads.writes
        _ = grads.are_in_memory  # where they are, now
        _ = grads.refs  # which are wanted after the step: later each object has to be fetched again

    def differ_from(self, grads: GradientSet) -> bool:
        """Whether anybody wrote to them, moved or reshaped them, or put others in their place.

        Args:
            grads: Those of the same parameters now.
        """
        seen = self._grads
        kinds = seen.kinds
        return not (
            are_same(grads, seen)
            and grads.writes == self._writes
            # `.data =` may show the same memory otherwise
            and (
                (kinds is not None and (kinds is grads.kinds or kinds.fit(grads)))
                or (grads.dtypes == seen.dtypes and grads.are_contiguous == seen.are_contiguous)
            )
            # wrappers have no address; what `.data =` does is seen there, and nowhere else
            and (not seen.are_in_memory or grads.addresses == seen.addresses)
        )

    def are_all_of(self, params: Sequence[Tensor]) -> bool:
        """Whether these parameters have these gradients in `p.grad`, as they were, and no others.

        Args:
            params: All there are.
        """
        owners, grads = with_gradient(params)
        if not are_same(owners, self._params):
            return False
        seen = self._grads
        if seen.kinds is None or not seen.kinds.fit(grads):
            return not self.differ_from(GradientSet(grads))
        return (
            are_same(grads, seen)
            and writes_to(grads, sharded=False) == self._writes
            and addresses_of(grads, sharded=False) == seen.addresses
        )

    def keep(self, params: Collection[Tensor]) -> None:
        """Forgets those of parameters that are not among these."""
        kept = [i for i, param in enumerate(self._params) if param in params]
        self._params = [self._params[i] for i in kept]
        self._grads = GradientSet(self._grads[i] for i in kept)
        self._writes = [self._writes[i] for i in kept]
