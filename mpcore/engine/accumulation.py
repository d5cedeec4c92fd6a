"""Gradients of several backward passes, unscaled and added up in float32.

    after each of them:  buffer = buffer + float32(gradient) * (1 / S);  the gradient is dropped

float16 and bfloat16 sums lose what is smaller than half their last place; a float32 sum keeps it.
Passes may have scales of their own, since what is added is unscaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mpcore.backends import Backend
from mpcore.engine.gradients import StepGradients
from mpcore.masters import Accumulated, Masters, MicroBatch

# elements that are unscaled before they are added: bounds the memory needed besides the buffers
_AT_ONCE = 2**24


class Accumulation:
    """The sums of one step. Nothing here syncs with the host.

    Args:
        masters: Where the masters are.
        backend: Unscales.
        before: What there is already.
    """

    def __init__(
        self, masters: Masters, backend: Backend, before: Accumulated | None = None
    ) -> None:
        self.sums, self.micro_batches = Accumulated({}, []) if before is None else before
        self.torn = False  # whether an exception left a part of a pass in the sums
        self._masters = masters
        self._backend = backend

    @torch.no_grad()
    def add(
        self, params: Sequence[Tensor], coefficient: Tensor, loss: str, finds_largest: bool
    ) -> None:
        """Adds gradients to the sums and drops them.

        Args:
            params: Parameters that have a gradient; 16-bit ones have a master.
            coefficient: 0-d float32, what unscales them.
            loss: The name of the loss.
            finds_largest: Whether its scale wants the largest one.
        """
        parts = []
        for some in _slices(params):
            part = self._unscaled(some, coefficient, finds_largest)
            self.torn = True
            self._add(part)
            part.release()
            for param in some:
                param.grad = None
            parts.append(part)
        self.micro_batches.append(_micro_batch(loss, parts))
        self.torn = False

    def _unscaled(
        self, some: list[Tensor], coefficient: Tensor, finds_largest: bool
    ) -> StepGradients:
        """Returns gradients, unscaled; leaves `p.grad` as it was if that fails."""
        before = [param.grad for param in some]
        try:
            for param in some:
                self._own(param)
            part = StepGradients(
                some, self._masters, self._backend, coefficient, finds_largest=finds_largest
            )
            part.apply()
        except BaseException:
            for param, grad in zip(some, before, strict=True):
                param.grad = grad
                if self._masters.of(param) is not param:
                    self._masters.of(param).grad = None
            raise
        return part

    def _own(self, param: Tensor) -> None:
        """Gives a gradient that would be unscaled in place memory of its own.

        It may be a view of a bucket that the next pass writes to, or part of a graph.
        """
        if self._masters.of(param) is param and param.grad is not None:
            param.grad = param.grad.detach().clone()

    def _add(self, part: StepGradients) -> None:
        old, new = [], []
        for param, grad in zip(part.params, part.final(), strict=True):
            held = self.sums.setdefault(param, grad)
            if held is not grad:
                old.append(held)
                new.append(grad)
        if old:
            torch._foreach_add_(old, new)

    def so_far(self) -> Accumulated:
        """Returns what there is; not copied."""
        return Accumulated(self.sums, self.micro_batches)

    def hand_over(self) -> None:
        """Makes the sums the gradients of masters, and of parameters without."""
        for param, total in self.sums.items():
            self._masters.of(param).grad = total


def _micro_batch(loss: str, parts: Sequence[StepGradients]) -> MicroBatch:
    """Returns what was found in gradients, some parameters each; no host sync."""
    found = [part.findings.largest for part in parts]
    seen = [largest for largest in found if largest is not None]
    return MicroBatch(
        loss,
        torch.stack([part.found_inf() != 0 for part in parts]).any(),
        torch.stack(seen).amax() if seen else None,
        {param: flag for part in parts for param, flag in part.flags()},
    )


def _slices(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields parameters in slices of about `_AT_ONCE` elements."""
    some: list[Tensor] = []
    room = _AT_ONCE
    for param in params:
        some.append(param)
        room -= param.numel()
        if room <= 0:
            yield some
            some, room = [], _AT_ONCE
    if some:
        yield some
