"""How the loss scales of an optimizer, its own and those of its losses, move after a step."""

from __future__ import annotations

import torch
from torch import Tensor

from mpcore.backends import Backend, ScaleMove
from mpcore.engine.external import External
from mpcore.engine.gradients import StepGradients
from mpcore.loss_scale import Losses, LossScale, LossScaleTensors, NoLossScale, count_step_


class ScaleMoves:
    """Moves every loss scale that took part in a step.

    Args:
        loss_scaling: How the optimizer's own scale moves.
        tensors: That scale and its counters.
        losses: Those with a scale of their own.
        backend: Moves scales.
    """

    def __init__(
        self, loss_scaling: LossScale, tensors: LossScaleTensors, losses: Losses, backend: Backend
    ) -> None:
        self._loss_scaling = loss_scaling
        self._tensors = tensors
        self._losses = losses
        self._backend = backend
        self._own_move = loss_scaling.move(tensors)

    def end_step(self, gradients: StepGradients, external: External | None, *, moved: bool) -> None:
        """Moves scales and counts; of a rank without gradients only if any other has some."""
        agreed = gradients.findings.agreed
        if agreed is not None and not gradients.params:
            self.advance_if(gradients, agreed.any_gradient)
            return
        if not moved:
            self.advance(gradients, external)
        if self._losses.totals is not None:
            self.count(gradients.found_inf())

    def advance(self, gradients: StepGradients, external: External | None) -> None:
        """Moves the scale of each loss that took part; no host sync."""
        update = self._backend.update_scale_
        scaling: LossScale = self._loss_scaling if external is None else NoLossScale()
        sums = gradients.accumulated
        if sums is None:
            largest = gradients.findings.largest
            scaling.advance_(self._tensors, gradients.found_inf(), update, largest)
            return
        outcomes = {name: sums.outcome(name) for name in sums.losses()}
        known = torch.stack([found != 0 for found, _ in outcomes.values()]).any()
        # a sum that overflows although no gradient did: nobody knows whose fault that is
        unexplained = (gradients.found_inf() != 0) & known.logical_not()
        for name, (own_found, largest) in outcomes.items():
            found_inf = ((own_found != 0) | unexplained).int()
            if name == "":
                scaling.advance_(self._tensors, found_inf, update, largest)
            else:
                loss = self._losses.each[name]
                loss.scaling.advance_(loss.tensors, found_inf, update, largest)

    def count(self, found_inf: Tensor) -> None:
        """Counts a step of several losses; no host sync."""
        if self._losses.totals is not None:
            count_step_(self._losses.totals, found_inf)

    def of_step(self, external: External | None) -> ScaleMove | None:
        """Returns how the scale moves at the end of a step, None if it only counts."""
        if external is not None or self._losses.totals is not None:
            return None  # several scales do not move alike
        return self._own_move

    def count_if_skipped(self, gradients: StepGradients) -> None:
        """Moves scales and counters as a skipped step does, if one was due."""
        self.advance_if(gradients, gradients.found_inf() != 0)

    def advance_if(self, gradients: StepGradients, condition: Tensor) -> None:
        """Moves scales and counters as a step does, if a 0-d bool of the device says so."""
        found_inf, totals = gradients.found_inf(), self._losses.totals
        scales = [self._tensors, *(loss.tensors for loss in self._losses.each.values())]
        kept = [t for scale in scales for t in scale.every()] + ([] if totals is None else [totals])
        before = [tensor.clone() for tensor in kept]
        counts = torch.zeros_like(condition)
        try:
            self.advance(gradients, None)
            self.count(found_inf)
            counts = condition
        finally:
            for tensor, old in zip(kept, before, strict=True):
                tensor.copy_(torch.where(counts, tensor, old))
