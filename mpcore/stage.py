"""Where within a step an optimizer is: what was scaled, unscaled and clipped, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mpcore._parameters import name_of, with_gradient
from mpcore._scaling import External
from mpcore.backends import Backend, ScaleMove
from mpcore.errors import StageError
from mpcore.gradients import StepGradients
from mpcore.headroom import HeadroomLossScale
from mpcore.loss_scale import LossScale, LossScaleTensors, NoLossScale
from mpcore.masters import Groups, Masters
from mpcore.skip_alarm import SkipAlarm
from mpcore.step_plan import StepPlan
from mpcore.step_result import StepResult


class Stage:
    """The course of one step: scale -> backward -> collect -> (unscale, clip) -> finish.

    Args:
        groups: The optimizer's param groups.
        device_of: Where each parameter was when it came to the optimizer.
        masters: Makes and holds the masters.
        backend: Does the passes over gradients.
        loss_scaling: How the scale moves.
        tensors: The scale and its counters.
        plan: Returns how the fused path updates the parameters given to it, None on another path.
    """

    def __init__(
        self,
        groups: Groups,
        device_of: Mapping[Tensor, torch.device],
        masters: Masters,
        backend: Backend,
        loss_scaling: LossScale,
        tensors: LossScaleTensors,
        plan: Callable[[list[Tensor]], StepPlan | None],
    ) -> None:
        self.gradients: StepGradients | None = None
        self.scaled = False  # whether scale() was called since the last step
        self.result: StepResult | None = None
        self._groups = groups
        self._device_of = device_of
        self._masters = masters
        self._backend = backend
        self._loss_scaling = loss_scaling
        self._tensors = tensors
        self._plan = plan
        self._outside_scale: Tensor | None = None
        self._alarm = SkipAlarm()

    @property
    def needs_scale(self) -> bool:
        """Whether gradients are only right if `scale` came first."""
        return not isinstance(self._loss_scaling, NoLossScale)

    @property
    def applied(self) -> bool:
        """Whether this step's gradients are unscaled already."""
        return self.gradients is not None and self.gradients.applied

    def collect(self, caller: str, external: External | None) -> StepGradients:
        """Returns this step's gradients, checked, with masters made; there may be none at all.

        Args:
            caller: The method that asks, for messages.
            external: The outside scaler that drives this step, if one does.
        """
        params = with_gradient(self._groups, self._device_of, self._masters)
        if self.gradients is not None:
            self._check_no_newcomer(caller, params, self.gradients)
            self.gradients.keep(params)
            return self.gradients
        self._check_scaled(caller, external, bool(params))
        # all of them: some optimizers move parameters that have no gradient in this step
        self._masters.create_for(p for g in self._groups for p in g["params"] if p.requires_grad)
        scale = self._tensors.scale if external is None else external.scale
        # an outside scale is any number and moves in place; our own follows from the coefficient
        self._outside_scale = None if external is None else scale.clone()
        self.gradients = self._gradients_of(params, scale, external)
        return self.gradients

    def collect_evaluation(self, external: External | None) -> StepGradients:
        """Returns the gradients of one evaluation of a user's closure, and readies the next."""
        gradients = self.collect("step(closure)", external)
        self.gradients, self.scaled = None, False
        if not gradients.params:
            raise StageError(
                "step(closure): expected the closure to call backward(), got no gradient at all."
            )
        return gradients

    def collect_zeros(self) -> StepGradients | None:
        """Returns the gradients if there are some, never scaled and all zero; syncs with the host.

        `torch.distributed.checkpoint` steps over such gradients once, before training, to make
        an optimizer create its state.
        """
        if self.scaled or self.gradients is not None or not self.needs_scale:
            return None
        params = with_gradient(self._groups, self._device_of, self._masters)
        if not params or any(bool(torch.any(p.grad != 0)) for p in params):  # type: ignore[arg-type]
            return None
        self._masters.create_for(params)
        return StepGradients(
            params, self._masters, self._backend, torch.ones_like(self._tensors.scale)
        )

    def _gradients_of(
        self, params: list[Tensor], scale: Tensor, external: External | None
    ) -> StepGradients:
        self._masters.create_for(params)
        found_inf = None if external is None else external.found_inf
        # the reciprocal of a power of two is exact; outside scalers use other numbers as well
        exact = scale if external is None else scale.double()
        # a new tensor: what unscales is what scaled, wherever the scale goes at the end of the step
        coefficient = exact.reciprocal().float()
        plan = self._plan(params) if params else None
        headroom = external is None and isinstance(self._loss_scaling, HeadroomLossScale)
        return StepGradients(
            params, self._masters, self._backend, coefficient, found_inf, plan, headroom
        )

    def _check_no_newcomer(
        self, caller: str, params: list[Tensor], gradients: StepGradients
    ) -> None:
        known = set(map(id, gradients.params))
        for param in params:
            if id(param) not in known:
                raise StageError(
                    f"{caller}: expected the gradients that unscale_() or clip_grad_norm_() saw, "
                    f"got a new one of {name_of(param, self._groups)}. Run all backward passes "
                    "first, or call zero_grad()."
                )

    def _check_scaled(self, caller: str, external: External | None, any_gradient: bool) -> None:
        if external is not None and self.scaled:
            raise StageError(
                f"{caller}: expected one scaler, got two: the loss went through this optimizer's "
                "scale() and a torch.amp.GradScaler steps it. Use one of them."
            )
        if external is None and any_gradient and not self.scaled and self.needs_scale:
            raise StageError(
                f"{caller}: expected gradients of a scaled loss, got no scale() since the last "
                "step. Write optimizer.backward(loss), or pass loss_scale=mpcore.NoLossScale()."
            )

    def finish(
        self, gradients: StepGradients, external: External | None, *, moved: bool = False
    ) -> None:
        """Records the step and, last of all, moves the scale unless it has moved; no host sync."""
        found_inf = gradients.found_inf()
        self.result = StepResult(
            found_inf, gradients, lambda p: name_of(p, self._groups), self._outside_scale
        )
        if not moved:
            scaling = self._loss_scaling if external is None else NoLossScale()
            update = self._backend.update_scale_
            self._tensors.advance_(scaling, found_inf, update, gradients.largest)
        self._alarm.note(self._tensors.skipped_steps, self._tensors.steps)
        self.forget()
        gradients.release()
        self.scaled = False

    def move(self, external: External | None) -> ScaleMove | None:
        """Returns how the scale moves at the end of a step, None if it only counts."""
        return None if external is not None else self._tensors.move(self._loss_scaling)

    def forget_step(self) -> None:
        """Ends a step that had no gradients: it counts as nothing."""
        self.forget()
        self.result, self.scaled = None, False

    def start_anew(self) -> None:
        """Drops what belongs to a state that was replaced."""
        self.forget()
        self.scaled = False
        self._alarm = SkipAlarm()

    def forget(self) -> None:
        """Drops gradients that were collected and not stepped."""
        if self.gradients is not None:
            self.gradients.release()
        self.gradients = None
