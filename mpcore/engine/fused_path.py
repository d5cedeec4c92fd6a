"""The fused path: the backend updates masters and weights itself, in one pass over them.

    inspect (one read of the gradients)  ->  update (one read, one write)  ->  loss scale

The update reads the scaled gradients and multiplies them by one device scalar, 1 / loss_scale times
the clip. A step that overflowed is skipped inside the update: nobody asks the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcore.backends import Backend, ScaleMove
from mpcore.base import label
from mpcore.engine.gradients import StepGradients
from mpcore.masters import Groups, Masters, StepPlan, WeightEdits, Writes, make_plan
from mpcore.updates import UpdateRule


class FusedPath:
    """Computes an optimizer's step without it.

    Args:
        inner: The wrapped optimizer, whose options and state are used; its `step` is not called.
        rule: What computes the update.
        masters: Masters and state.
        backend: Does the passes.
        saturated: 0-d int64, counts weights clamped to the finite maximum.
        writes: Told before the first write.
        edits: Knows whether an update has to adopt weights that others wrote to.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        rule: UpdateRule,
        masters: Masters,
        backend: Backend,
        saturated: Tensor,
        writes: Writes,
        edits: WeightEdits,
    ) -> None:
        self.inner = inner
        self.rule = rule
        #: the param groups that are updated here, the optimizer's own list if it is all of them
        self.groups: Groups = inner.param_groups
        self._masters = masters
        self._backend = backend
        self._saturated = saturated
        self._writes = writes
        self._edits = edits
        self._plan: StepPlan | None = None
        self._handed_over = -1  # the version of the masters whose state is fit for the other path

    def take(self, groups: Groups) -> None:
        """Updates these param groups from now on; no host sync.

        Args:
            groups: Of the optimizer, its own list if it is all of them.
        """
        self.groups = groups
        self._plan = None  # the other path may change the state of what leaves

    def hand_over(self) -> None:
        """Makes the state what the wrapped optimizer's own `step` expects."""
        if self._handed_over != self._masters.version:
            self.hand_over_of(p for group in self.inner.param_groups for p in group["params"])
            self._plan = None
            self._handed_over = self._masters.version

    def hand_over_of(self, params: Iterable[Tensor]) -> None:
        """Makes the state of these parameters what the optimizer's own `step` expects."""
        for param in params:
            state = self.inner.state.get(self._masters.of(param))
            if state is not None:
                self.rule.hand_over(state)

    def plan(self, params: Sequence[Tensor]) -> StepPlan:
        """Returns how `params` are updated, made anew if tensors or options changed; no host sync.

        Args:
            params: Those that have a gradient; 16-bit ones have a master.
        """
        groups = self.groups
        if self._plan is None or not self._plan.fits(params, groups, self.rule, self._masters):
            self._plan = None  # frees what the old one holds before the new one is made
            self._plan = make_plan(
                params, groups, self.inner.state, self._masters, self.rule, self._backend
            )
        self._handed_over = -1
        return self._plan

    def likely_plan(self, params: Sequence[Tensor]) -> StepPlan:
        """Returns the last plan if it is of `params`, unchecked: enough to prepare scalars with.

        `step` checks whether it still fits, once. One of masters that were replaced is not kept
        until then: it holds these, and their moments.
        """
        last = self._plan
        same_state = last is not None and last.version == self._masters.version
        if last is not None and same_state and last.is_of(params):
            return last
        self._masters.take_over_values()  # making a plan shows the state anew
        return self.plan(params)

    def step(self, gradients: StepGradients, move: ScaleMove | None) -> bool:
        """Updates or skips, then moves the loss scale if it can; no host sync.

        Args:
            gradients: What to step with.
            move: How the loss scale moves after the step, or None.

        Returns:
            Whether the scale has moved: with devices that differ, somebody else has to do it.
        """
        plan = self.plan(gradients.params)
        gradients.plan = plan  # the one that a clip prepared may hold a state that is gone
        gradients.inspect()
        gradients.agree()
        moved = self.update(plan, gradients, move)
        self._masters.note_weights()
        return moved

    def update(self, plan: StepPlan, gradients: StepGradients, move: ScaleMove | None) -> bool:
        """Updates by a plan, or skips, over gradients that were looked at; no host sync.

        Args:
            plan: What `plan` has returned.
            gradients: What to step with; others than those of the plan may be among them.
            move: As for `step`.

        Returns:
            As `step` does. Whoever calls this notes that weights are their rounded masters.
        """
        coefficient, found_inf = gradients.coefficient, gradients.found_inf()
        home = self._saturated.device
        moved = False
        for part in plan.devices:
            part.prepare(self._backend)
            alone = part.device == home and part is plan.devices[-1]
            saturated = self._saturated
            if part.device != home:
                saturated = torch.zeros_like(saturated, device=part.device)
            grads = [gradients.stored_of(params) for params in part.params]
            here, found_here = coefficient, found_inf
            if part.device != here.device:
                here = here.to(part.device, non_blocking=True)
                found_here = found_inf.to(part.device, non_blocking=True)
            edits = self._edits.begin_update(part.params)
            self._writes.begin()
            with label("mpcore.update"):
                self._backend.update_(
                    part.plan,
                    grads,
                    here,
                    found_here,
                    saturated,
                    then=move if alone else None,
                    edits=edits,
                )
            part.used()
            moved = moved or (alone and move is not None)
            if part.device != home:
                self._saturated.add_(saturated.to(home, non_blocking=True))
        # writes by address, and those of torch's fused kernels, tell autograd nothing
        torch.autograd.graph.increment_version(plan.written)
        self._note_step()
        return moved

    def _note_step(self) -> None:
        """Tells LR schedulers on the wrapped optimizer that it was stepped: they warn otherwise."""
        inner: Any = self.inner
        inner._opt_called = True
