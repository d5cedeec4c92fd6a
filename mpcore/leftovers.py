"""Gradients that nobody cleared after a step: the next pass adds to them, by another scale."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpcore._layouts import own_memory
from mpcore.backends import Backend
from mpcore.gradients import StepGradients


class _Left(NamedTuple):
    """A gradient that a step has left in `p.grad`, and how often it was written to."""

    param: Tensor
    grad: weakref.ref[Tensor]
    writes: int


class Leftovers:
    """What the last step has left in `p.grad`. Nothing here syncs with the host."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forgets them: gradients were cleared, or belong to another scaler."""
        self._scaled: list[_Left] = []
        self._unscaled: list[_Left] = []
        self._unscaled_by: Tensor | None = None
        self._failed: list[_Left] = []
        self.torn = False  # whether an exception came while they were multiplied

    def note(self, gradients: StepGradients, params: Sequence[Tensor]) -> None:
        """Notes what a step has left.

        Args:
            gradients: Those of the step.
            params: The optimizer's.
        """
        self.forget()
        self._unscaled_by = gradients.unscaled_by
        in_place = {id(p) for p in gradients.unscaled_in_place()}
        for param in params:
            grad = param.grad
            if grad is not None and not grad.requires_grad:
                left = self._unscaled if id(param) in in_place else self._scaled
                left.append(_Left(param, weakref.ref(grad), grad._version))

    def note_failed(self, params: Sequence[Tensor]) -> None:
        """Notes the gradients of a step that failed, of these parameters."""
        grads = [(param, param.grad) for param in params]
        self._failed = [_Left(p, weakref.ref(g), g._version) for p, g in grads if g is not None]

    def were_replaced(self) -> bool:
        """Whether a step has failed, and another pass has left all its gradients since."""
        if not self._failed or _still_there(self._failed):
            return False
        return any(param.grad is not None for param, _, _ in self._failed)

    def forget_failed(self) -> None:
        """Forgets a step that failed: it was thrown away."""
        self._failed = []
        if self.torn:
            self.forget()

    @torch.no_grad()
    def rescale_(self, scale: Tensor, backend: Backend, *, moves: bool) -> None:
        """Multiplies those that are still there, so that the next pass may add to them.

        Args:
            scale: 0-d float32, of the next pass.
            backend: Multiplies.
            moves: Whether the scale can have moved since.
        """
        if self._unscaled_by is None:
            return
        unscaled, scaled = _still_there(self._unscaled), _still_there(self._scaled)
        self.torn = bool(unscaled or (scaled and moves))
        if unscaled:
            _multiply_(unscaled, scale, backend)
        if scaled and moves:
            _multiply_(scaled, scale * self._unscaled_by, backend)
        self.forget()


def _still_there(left: list[_Left]) -> list[Tensor]:
    """Returns the parameters whose gradient is the one that was left, and not written to."""
    there = []
    for param, grad, writes in left:
        now = param.grad
        if now is not None and grad() is now and now._version == writes:
            there.append(param)
    return there


def _multiply_(params: list[Tensor], factor: Tensor, backend: Backend) -> None:
    by_device: dict[torch.device, list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            grad = own_memory(param, param.grad)
            by_device.setdefault(grad.device, []).append(grad)
    for device, grads in by_device.items():
        flags = torch.zeros(len(grads), dtype=torch.int32, device=device)
        backend.unscale_(grads, factor.to(device, non_blocking=True), flags)
