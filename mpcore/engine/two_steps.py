"""Sharpness-aware optimizers: one step of two calls, each with gradients of a pass of its own.

`first_step()` climbs from the weights w along the gradients there, `second_step()` goes back and
takes the step of w with the gradients of the higher point (Foret et al., "Sharpness-Aware
Minimization", ICLR 2021).
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpcore.base import outside_graphs
from mpcore.engine.external import External
from mpcore.engine.gradients import StepGradients
from mpcore.engine.paths import Paths
from mpcore.engine.stage import Stage
from mpcore.errors import StageError
from mpcore.masters import Masters, Snapshot, WeightEdits, Writes

#: The methods of a wrapped optimizer that make one step together.
FIRST, SECOND = "first_step", "second_step"


class Climb(NamedTuple):
    """The first half of a step of two calls.

    Attributes:
        before: What the step began with.
        found_inf: Whether its gradients overflowed, so that it was not made.
    """

    before: Snapshot
    found_inf: bool


class TwoSteps:
    """Calls the two methods over masters; an overflow in either pass skips both."""

    inner: torch.optim.Optimizer
    state: defaultdict[Tensor, Any]
    param_groups: list[dict[str, Any]]
    _began: bool
    _climb: Climb | None
    _edits: WeightEdits
    _masters: Masters
    _paths: Paths
    _saturated: Tensor
    _stage: Stage
    _writes: Writes

    @property
    def _makes_two(self) -> bool:
        """Whether the wrapped optimizer's step has two calls."""
        return hasattr(self.inner, FIRST) and hasattr(self.inner, SECOND)

    def _check_between_steps(self, caller: str) -> None:
        self._writes.check(caller)
        if self._climb is not None:
            raise StageError(
                f"{caller}: expected a call between two steps, got one between {FIRST}() and "
                f"{SECOND}(), while weights are not where the step began. Run the second backward "
                f"pass and call {SECOND}() first."
            )

    @outside_graphs
    def _first_step(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Climbs, or drops gradients that are not finite; syncs with the host once."""
        inspect.signature(method).bind(*args, **options)  # a TypeError of its own, before any write
        self._stage.check_whole(f"{FIRST}()")
        if self._climb is not None:  # a loop that broke off: the step has not begun
            self._descend(self._climb)
        gradients = self._collect_pass(f"{FIRST}()")
        climb = Climb(Snapshot(self.inner, self._masters), bool(gradients.found_inf()))
        result = None
        try:
            if not climb.found_inf:
                result = self._call(gradients, lambda: method(*args, **options))
        except BaseException:
            self._descend(climb)
            raise
        finally:
            gradients.release()
        if climb.found_inf:
            _drop(gradients)
        self._climb = climb
        return result

    @outside_graphs
    def _second_step(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Steps, or goes back and drops them if one of either pass is not finite; syncs once."""
        inspect.signature(method).bind(*args, **options)
        climb = self._climb
        if climb is None:
            raise StageError(
                f"{SECOND}(): expected {FIRST}() before it, got none since the last step. Call "
                f"zero_grad(), and {FIRST}() after a backward pass."
            )
        gradients = self._collect_pass(f"{SECOND}()")
        if not gradients.params and not gradients.has_ranks:
            self._descend(climb)
            self._stage.throw_away(last_step=True)
            return None
        if climb.found_inf:
            gradients.findings.add(torch.ones((), device=self._saturated.device))
        result = None
        if bool(gradients.found_inf()):
            self._descend(climb)
            _drop(gradients)
        else:
            self._writes.begin()
            result = self._call(gradients, lambda: method(*args, **options))
        self._climb, self._began = None, True
        self._stage.finish(gradients, External.of(self))
        return result

    def _collect_pass(self, caller: str) -> StepGradients:
        self._stage.ranks.check_not_joined(caller)
        self._masters.take_over_edits(self.state, self.param_groups)
        gradients = self._stage.collect_pass(caller, External.of(self))
        self._edits.adopt(began=self._began)
        gradients.apply()
        gradients.inspect()
        gradients.agree()
        return gradients

    def _call(self, gradients: StepGradients, method: Callable[[], Any]) -> Any:
        result = self._paths.general.call_over_masters(method)
        self._paths.general.hand_back(gradients)
        return result

    def _descend(self, climb: Climb) -> None:
        """Goes back to before the first call."""
        climb.before.restore()
        self._paths.general.link_state()
        self._climb = None


def _drop(gradients: StepGradients) -> None:
    """Clears what a method that was skipped would have cleared: all later passes would add to it.

    Of a pass that overflowed nothing is of use, and `zero_grad=True` is all that many loops write.
    """
    for param in gradients.params:
        param.grad = None
