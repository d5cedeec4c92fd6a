"""Where within a step an optimizer is: what was scaled, unscaled and clipped, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpcore.backends import Backend
from mpcore.engine import stage_checks as checks
from mpcore.engine.checked_parameters import CheckedParameters, Collected
from mpcore.engine.clip_watch import ClipWatch
from mpcore.engine.external import External
from mpcore.engine.flush_watch import FlushWatch
from mpcore.engine.gradients import StepGradients
from mpcore.engine.leftovers import Leftovers
from mpcore.engine.passes import Passes
from mpcore.engine.scale_moves import ScaleMoves
from mpcore.engine.stage_questions import StageQuestions
from mpcore.engine.step_ranks import StepRanks
from mpcore.engine.step_result import StepResult
from mpcore.engine.step_sums import StepSums
from mpcore.engine.waiting import WaitingGradients
from mpcore.engine.watcher import Watcher
from mpcore.loss_scale import (
    Losses,
    LossScale,
    LossScaleTensors,
    ScaledLoss,
    new_alarm,
)
from mpcore.masters import Accumulated, Groups, Masters, StepPlan, WeightEdits, Writes, name_of


class Stage(StageQuestions):
    """The course of one step: scale -> backward -> collect -> (unscale, clip) -> finish.

    Args:
        groups: The optimizer's param groups.
        device_of: Where each parameter was when it came to the optimizer.
        masters: Makes and holds the masters.
        backend: Does the passes over gradients.
        loss_scaling: How the scale moves.
        tensors: The scale and its counters.
        losses: Those with a scale of their own.
        plan: Returns how the fused path updates the parameters given to it, None on another path.
        writes: Whether everything is whole.
        edits: Knows which weights do not go with their masters.
        ranks: Who else has to agree with a step.
    """

    def __init__(
        self,
        groups: Groups,
        device_of: Mapping[Tensor, torch.device],
        masters: Masters,
        backend: Backend,
        loss_scaling: LossScale,
        tensors: LossScaleTensors,
        losses: Losses,
        plan: Callable[[Sequence[Tensor]], StepPlan | None],
        writes: Writes,
        edits: WeightEdits,
        ranks: StepRanks,
    ) -> None:
        self.gradients: StepGradients | None = None
        self.passes = Passes()
        self.result: StepResult | None = None
        self._groups = groups
        self._masters = masters
        self._backend = backend
        self._loss_scaling = loss_scaling
        self._tensors = tensors
        self._losses = losses
        self._plan = plan
        self._writes = writes
        self._edits = edits
        self.ranks = ranks
        self.moves = ScaleMoves(loss_scaling, tensors, losses, backend)
        self._outside_scale: Tensor | None = None
        losses.own_alarm = new_alarm(loss_scaling, 0)
        self._sums = StepSums(masters, backend)
        self.clip_watch = ClipWatch(groups)
        self.flush_watch = FlushWatch()
        self._leftovers = Leftovers()
        self.parameters = CheckedParameters(groups, device_of, masters)
        self.waiting = WaitingGradients()
        self.watcher: Watcher | None = None

    def collect(self, caller: str, external: External | None) -> StepGradients:
        """Returns this step's gradients, checked, with masters made; there may be none at all.

        Args:
            caller: The method that asks, for messages.
            external: The outside scaler that drives this step, if one does.
        """
        if self._is_between_steps:
            found = self.parameters.with_gradient(caller)
            self._edits.check(caller)
            return self._begin(caller, found, external)
        self.check_whole(caller)
        seen = self.gradients
        if external is None and seen is not None and seen.are_as_seen(self._params()):
            self._edits.check(caller)
            return seen
        params, _ = found = self.parameters.with_gradient(caller)
        if self._leftovers.were_replaced():
            self.throw_away()  # which puts others into `p.grad`, or none
            params, _ = found = self.parameters.with_gradient(caller)
        if self.gradients is not None:
            checks.check_no_newcomer(caller, params, self.gradients, self._groups)
            self._edits.check(caller)
            self.gradients.keep(checks.still_there(params, self.gradients, self._masters))
            self.gradients.take_edits()
            if external is not None:
                self.gradients.findings.add(external.found_inf)
            return self.gradients
        self._edits.check(caller)
        if self._sums.exist:
            self.gradients = self._summed(caller, external)
            return self.gradients
        return self._begin(caller, found, external)

    def _begin(self, caller: str, found: Collected, external: External | None) -> StepGradients:
        """Returns gradients that were found as those of this step."""
        params = found.params
        if self._loss_scaling.scales:
            twice = self.passes.scaled and not self.passes.thrown
            # with ranks, the last stage of a pipeline may be the only one that has a loss
            asked = bool(params) and (external is not None or not self.ranks.agree)
            checks.check_scaled(caller, external, asked, self.passes.scaled, twice)
        elif external is None:
            self.flush_watch.see(params, self._backend, self._tensors.scale.device)
        self.clip_watch.check()
        scale = self._tensors.scale if external is None else external.scale
        # an outside scale is any number and moves in place; our own follows from the coefficient
        self._outside_scale = None if external is None else scale.clone()
        self.gradients = self._gradients_of(found, scale, external)
        return self.gradients

    def unscale(self, caller: str, external: External | None) -> StepGradients:
        """Collects gradients, unscales them and shows them in `p.grad`; no host sync."""
        checks.check_not_unscaled(caller, self.gradients)
        gradients = self.collect(caller, external)
        gradients.apply()
        gradients.inspect()  # sums: what follows may edit them
        gradients.expose(self._see_pass)
        self._leftovers.forget_failed()  # what is shown replaces what an earlier try has seen
        return gradients

    def _see_pass(self, param: Tensor) -> None:
        """Raises in a backward pass that would add scaled gradients to unscaled ones."""
        self.check_open(f"a backward pass to {name_of(param, self._groups)}")

    def note_failed(self) -> None:
        """Notes that a step has failed: what it has collected may be cleared by anybody."""
        if self.gradients is not None and not self.unscaled:
            self.gradients.collected = None  # which would keep them alive
            self._leftovers.note_failed(self.gradients.params)

    def begin_pass(self, caller: str) -> None:
        """Readies what the last step left in `p.grad`, if nobody cleared it; no host sync."""
        if not self._is_between_steps:
            self.check_open(caller)
            self.waiting.check()
        moves = self._loss_scaling.moves
        self._leftovers.rescale_(self._tensors.scale, self._backend, moves=moves)

    def note_scaled(self, outputs: Any) -> None:
        """Notes that a scaled backward pass is to come."""
        self.passes = Passes.begun()
        self.clip_watch.watch(outputs)

    def check_open(self, caller: str) -> None:
        """Raises if gradients of this step were collected: those of another pass would get lost."""
        self.check_whole(caller)
        if checks.are_dropped(self.gradients) or self._leftovers.were_replaced():
            self.throw_away()  # by model.zero_grad(), for instance
        checks.check_none_collected(caller, self.gradients)

    def accumulate(self, caller: str, loss: ScaledLoss | None = None) -> None:
        """Adds the gradients that are there to float32 sums and drops them; no host sync.

        Args:
            caller: The method that asks, for messages.
            loss: Whose gradients they are; None: the optimizer's own.
        """
        self.check_open(caller)
        params, _ = self.parameters.with_gradient(caller)
        if not params:
            return
        if loss is None and not self.passes.zeroed and self._loss_scaling.scales:
            checks.check_scaled(caller, None, True, self.passes.scaled, False)
        self.clip_watch.check()
        scaling = self._loss_scaling if loss is None else loss.scaling
        scale = self._tensors.scale if loss is None else loss.tensors.scale
        if not scaling.scales:
            self.flush_watch.see(params, self._backend, scale.device)
        name = "" if loss is None else loss.name
        self._sums.add(params, scale, name, scaling.wants_largest)

    @property
    def accumulated(self) -> Accumulated | None:
        """What was added up for the next step, None if nothing was."""
        self.check_whole("state_dict()")
        return self._sums.so_far()

    def resume(self, accumulated: Accumulated | None) -> None:
        """Goes on from what was added up elsewhere."""
        self._sums.resume(accumulated)

    def _summed(self, caller: str, external: External | None) -> StepGradients:
        """Returns the sums as the gradients of this step."""
        checks.check_no_outside_scaler(caller, external)
        self.accumulate(caller)  # what has come since
        params = self._sums.meet(self._params(), self.ranks.of_sums())
        gradients = self._gradients_of(Collected(params, None), self._tensors.scale, None)
        self._sums.hand_over(gradients)
        self._outside_scale = None
        return gradients

    def begin_closure(self) -> None:
        """Notes which gradients wait for the step that a closure comes to; no host sync."""
        scaled = self.passes.wait
        may_wait = scaled or not self._loss_scaling.scales
        params = self._leftovers.others(self._params()) if may_wait else []
        self.waiting.note(params, whole=self._holds_any, scaled=scaled)

    def collect_pass(self, caller: str, external: External | None) -> StepGradients:
        """Returns the gradients of one of several passes of a step, and readies the next."""
        gradients = self.collect(caller, external)
        gradients.conceal()
        self.gradients, self.passes = None, self.passes.stepped()
        self._leftovers.expect(gradients, self._params())
        self.waiting.forget()
        return gradients

    def _params(self) -> list[Tensor]:
        return [param for group in self._groups for param in group["params"]]

    def _gradients_of(
        self, found: Collected, scale: Tensor, external: External | None
    ) -> StepGradients:
        params, grads = found
        self._masters.create_for_step(params)
        # the reciprocal of a power of two is exact; outside scalers use other numbers as well
        coefficient = scale if external is None else scale.double().reciprocal().float()
        return StepGradients(
            params,
            self._masters,
            self._backend,
            coefficient,
            inverted=external is None,
            external_found_inf=None if external is None else external.found_inf,
            plan=self._plan(params) if self._backend.prepares_on_the_way and params else None,
            finds_largest=external is None and self._loss_scaling.wants_largest,
            statistics=None if self.watcher is None else self.watcher.begin_step(params),
            collected=grads,
            agreement=self.ranks.of_pass(external),
            scaled=self.passes.scaled or grads is None or not self._loss_scaling.scales,
        )

    def finish(
        self, gradients: StepGradients, external: External | None, *, moved: bool = False
    ) -> None:
        """Records the step and, last of all, moves the scale unless it has moved; no host sync."""
        name = partial(name_of, groups=self._groups)
        result = StepResult(gradients.found_inf(), gradients, name, self._outside_scale)
        self._writes.begin()
        self.moves.end_step(gradients, external, moved=moved)
        left = gradients.left_as_they_were()
        if self.gradients is not gradients:  # those of a closure
            gradients.release()
        self.drop_gradients()
        self.passes = self.passes.stepped()
        if external is None:
            params = self._params()
            whole = left is not None and len(left) == len(params)
            self._leftovers.note(gradients, params, left if whole else None)
        else:
            self._leftovers.forget()
        self.result = result
        self._writes.end()
        # last: they may raise
        try:
            if self.watcher is not None:
                self.watcher.end_step(gradients, result, own_scale=external is None)
        finally:
            self._losses.note(self._tensors.counters)

    def note_cleared(self, set_to_none: bool) -> None:
        """Notes that `p.grad` is None everywhere, or zeros."""
        self.passes = self.passes.cleared(zeros=not set_to_none)
        if set_to_none:
            self._leftovers.forget()

    def start_anew(self, overflows_at_min: int) -> None:
        """Drops what belongs to a state that was replaced, by one with that counter."""
        self.forget(last_step=True)
        self.ranks.start_anew()
        self._losses.own_alarm = new_alarm(self._loss_scaling, overflows_at_min)

    def forget(self, *, last_step: bool = False) -> None:
        """Drops gradients that were collected and not stepped, and what was heard of their pass.

        Args:
            last_step: Whether the last step is none any more, either.
        """
        if last_step:
            self.result, self.passes = None, self.passes.stepped()
        self.drop_gradients()
        self.clip_watch.forget()
        self._leftovers.forget_failed()
        if self.watcher is not None:
            self.watcher.forget(last_step=last_step)

    def throw_away(self, *, last_step: bool = False) -> None:
        """Ends a step that nobody took, as skipped if a look found overflow; may raise; no sync."""
        self.waiting.warn_if_any()
        gradients = self.gradients
        self.passes = self.passes.thrown_away(begun=self.clip_watch.has_begun)
        counts = gradients is not None and gradients.counts and self._outside_scale is None
        # first: if it fails, what was found is not forgotten
        if gradients is not None and counts and not gradients.torn:
            self.moves.count_if_skipped(gradients)
        self.forget(last_step=last_step)
        if counts:
            self._losses.note(self._tensors.counters)

    def drop_gradients(self) -> None:
        """Drops gradients that were collected and not stepped."""
        if self.gradients is not None:
            self.gradients.release()
        self.gradients = None
        self._sums.drop()
        self.waiting.forget()
