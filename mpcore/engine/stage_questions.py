"""What can be asked of the course of a step; nothing here changes it or syncs with the host."""

from __future__ import annotations

from mpcore.engine import stage_checks as checks
from mpcore.engine.gradients import StepGradients
from mpcore.engine.leftovers import Leftovers
from mpcore.engine.passes import Passes
from mpcore.engine.step_sums import StepSums
from mpcore.engine.waiting import WaitingGradients
from mpcore.masters import Groups, Writes


class StageQuestions:
    """Where within a step an optimizer is, as its `Stage` knows it."""

    gradients: StepGradients | None
    passes: Passes
    waiting: WaitingGradients
    _groups: Groups
    _leftovers: Leftovers
    _sums: StepSums
    _writes: Writes

    @property
    def _holds_any(self) -> bool:
        """Whether gradients were collected or added up for the next step."""
        return self.gradients is not None or self._sums.exist

    @property
    def _is_between_steps(self) -> bool:
        """Whether all of the last step is over, and of the next one nothing but backward passes."""
        return not (
            self.gradients is not None
            or self._writes.begun
            or self._sums.exist
            or self._leftovers.has_failed
            or self.waiting.exist
        )

    @property
    def is_untouched(self) -> bool:
        """Whether nothing of a step was scaled, collected or added up."""
        return not self.passes.scaled and not self._holds_any

    @property
    def unscaled(self) -> bool:
        """Whether `unscale_` was called in this step."""
        return self.gradients is not None and self.gradients.exposure is not None

    @property
    def waits(self) -> bool:
        """Whether gradients of a scaled loss wait for a step."""
        waits = self.passes.wait and checks.any_gradient(self._groups)
        return waits or self._holds_any

    def check_whole(self, caller: str) -> None:
        """Raises if an exception has left half of a step, of a load or of gradients."""
        self._writes.check(caller)
        collected = self.gradients is not None and self.gradients.torn
        if collected or self._leftovers.torn or self._sums.torn:
            checks.raise_torn(caller)
