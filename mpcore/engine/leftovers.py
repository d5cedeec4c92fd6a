"""Gradients that nobody cleared after a step: the next pass adds to them, by another scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import eq

import torch
from torch import Tensor

from mpcore.backends import Backend
from mpcore.base import GradientSet, own_memory, with_gradient, writes_to
from mpcore.engine.gradients import StepGradients


class _Left:
    """Gradients that a step has left in `p.grad`, and how often each was written to.

    Args:
        params: Parameters that have a gradient.
        grads: Their gradients.
    """

    def __init__(self, params: Sequence[Tensor] = (), grads: Iterable[Tensor] = ()) -> None:
        self.params = params
        grads = GradientSet.of(grads)
        self._grads = grads.refs  # nobody is to keep them alive
        self._writes = grads.writes

    def still_there(self) -> list[Tensor]:
        """Returns the parameters whose gradient is the one that was left, and not written to."""
        if self is _NONE:
            return []
        params, grads = with_gradient(self.params)
        if params is self.params and not any(map(eq, writes_to(grads), self._writes)):
            return []  # usually: the next pass has added to all of them
        return [
            param
            for param, grad, writes in zip(self.params, self._grads, self._writes, strict=True)
            if (now := param.grad) is not None
            and grad() is now
            and writes_to([now]) == [writes]
            and not now.requires_grad  # of a pass with create_graph: not ours to multiply
        ]


_NONE = _Left()


class Leftovers:
    """What the last step has left in `p.grad`. Nothing here syncs with the host."""

    def __init__(self) -> None:
        self._failed = _NONE  # gradients of a step that an exception ended
        self.forget()

    def forget(self) -> None:
        """Forgets them: gradients were cleared, or belong to another scaler."""
        self._scaled = self._unscaled = self._failed = _NONE
        self._unscaled_by: Tensor | None = None
        self._expected: tuple[StepGradients, Sequence[Tensor]] | None = None
        self.torn = False  # whether an exception came while they were multiplied

    def note(
        self,
        gradients: StepGradients,
        params: Sequence[Tensor],
        left: GradientSet | None = None,
    ) -> None:
        """Notes what a step has left.

        Args:
            gradients: Those of the step.
            params: The optimizer's.
            left: What all of these have, if nobody could change that.
        """
        self.forget()
        self._unscaled_by = gradients.unscaled_by
        if left is not None:
            self._scaled = _Left(gradients.params, left)
            return
        in_place = set(map(id, gradients.unscaled_in_place()))
        params, grads = with_gradient(params)
        if in_place:
            self._unscaled = _Left(*with_gradient([p for p in params if id(p) in in_place]))
            params, grads = with_gradient([p for p in params if id(p) not in in_place])
        self._scaled = _Left(params, grads)

    def expect(self, gradients: StepGradients, params: Sequence[Tensor]) -> None:
        """Notes that a step which goes on may have left some, to be found by `rescale_`.

        Args:
            gradients: Those of one of its passes.
            params: The optimizer's.
        """
        self.forget()
        self._expected = gradients, params

    def note_failed(self, params: Sequence[Tensor]) -> None:
        """Notes the gradients of a step that failed, of these parameters."""
        self._failed = _Left(*with_gradient(params))

    @property
    def has_failed(self) -> bool:
        """Whether a step has failed whose gradients may be there, or one goes on."""
        return self._failed is not _NONE or self.torn or self._expected is not None

    def were_replaced(self) -> bool:
        """Whether a step has failed, and another pass has left all its gradients since."""
        if self._failed is _NONE:
            return False
        there = any(param.grad is not None for param in self._failed.params)
        return there and not self._failed.still_there()

    def others(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Returns those of `params` whose gradient is not one that the last step has left."""
        left = {id(p) for part in (self._scaled, self._unscaled) for p in part.still_there()}
        return [param for param in params if id(param) not in left]

    def forget_failed(self) -> None:
        """Forgets a step that failed: it was thrown away."""
        self._failed = _NONE
        if self._expected is not None:
            self._expected[0].collected = None  # nobody is to keep them alive
        if self.torn:
            self.forget()

    def rescale_(self, scale: Tensor, backend: Backend, *, moves: bool) -> None:
        """Multiplies those that are still there, so that the next pass may add to them.

        Args:
            scale: 0-d float32, of the next pass.
            backend: Multiplies.
            moves: Whether the scale can have moved since.
        """
        if self._expected is not None:
            self.note(*self._expected)
        if self._unscaled_by is None:
            return
        unscaled, scaled = self._unscaled.still_there(), self._scaled.still_there()
        self.torn = bool(unscaled or (scaled and moves))
        if unscaled:
            _multiply_(unscaled, scale, backend)
        if scaled and moves:
            _multiply_(scaled, scale * self._unscaled_by, backend)
        self.forget()


@torch.no_grad()
def _multiply_(params: list[Tensor], factor: Tensor, backend: Backend) -> None:
    by_device: dict[torch.device, list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            grad = own_memory(param, param.grad)
            by_device.setdefault(grad.device, []).append(grad)
    for device, grads in by_device.items():
        flags = torch.zeros(len(grads), dtype=torch.int32, device=device)
        backend.unscale_(grads, factor.to(device, non_blocking=True), flags)
