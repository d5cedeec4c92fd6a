"""The part of `mpcore.MixedPrecisionOptimizer` between backward pass and step: unscale and clip."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

from mpcore.base import check_number, outside_graphs
from mpcore.engine.external import External
from mpcore.engine.gradients import StepGradients
from mpcore.engine.stage import Stage
from mpcore.errors import ArgumentError, ArgumentTypeError, StageError
from mpcore.masters import Masters


class Unscaling:
    """The methods of an optimizer that unscale and clip before its step."""

    _stage: Stage
    _masters: Masters
    state: defaultdict[Tensor, Any]
    param_groups: list[dict[str, Any]]

    @outside_graphs
    def unscale_(self) -> None:
        """Unscales now instead of in `step`, and shows the result in `p.grad`; no host sync.

        From then on `p.grad` is the float32 gradient that `step` uses, also that of a 16-bit
        parameter: whatever clips, adds noise, logs or edits acts on it, another tensor may take its
        place, and None drops it. `step` and `zero_grad` of this object put the model's own 16-bit
        tensors back. Whether the step skips is fixed here, but for edits that are not finite.

        Raises:
            StageError: Called twice in a step, or the gradients were never scaled. A backward pass
                before the step raises it too.
        """
        self._masters.take_over_edits(self.state, self.param_groups)
        self._stage.unscale("unscale_()", External.of(self))

    @outside_graphs
    def grads(self) -> list[Tensor]:
        """Returns the unscaled gradients in the order of the parameters; no host sync.

        They are those in `p.grad`, which `step` uses: editing them in place changes the step.

        Returns:
            float32 (float64 for float64 parameters); parameters without a gradient are left out.

        Raises:
            StageError: `unscale_()` was not called in this step.
        """
        if not self._stage.unscaled:
            raise StageError(
                "grads(): expected a call after unscale_() of the same step, got one before. Call "
                "unscale_() first; where an mpcore.GradScaler scales, scaler.unscale_(optimizer)."
            )
        return self._collect("grads()").final()

    @outside_graphs
    def clip_grad_norm_(self, max_norm: float, *others: object, norm_type: float = 2.0) -> Tensor:
        """Clips the global 2-norm of the unscaled gradients to `max_norm`; no host sync.

        Nothing is written: the coefficient `min(1, max_norm / (norm + 1e-6))` joins the multiply
        that unscales. Their product is one float32, so it should stay above 2^-126. After
        `unscale_` the gradients in `p.grad` are multiplied at once.

        Args:
            max_norm: Above 0.
            others: None: torch.nn.utils.clip_grad_norm_ takes parameters first, this does not.
            norm_type: 2.0, the only one that is computed here.

        Returns:
            The norm before clipping, 0-d float32; not finite if the step will be skipped.

        Raises:
            ArgumentError: `max_norm` is not above 0, or `norm_type` is not 2.
            ArgumentTypeError: Parameters were passed, or `max_norm` is no number.
            StageError: The gradients were never scaled.
        """
        if others:
            raise ArgumentTypeError(
                "clip_grad_norm_: expected max_norm alone, got several arguments. The optimizer "
                "has its parameters: write optimizer.clip_grad_norm_(1.0)."
            )
        if norm_type != 2:
            raise ArgumentError(
                f"norm_type: expected 2.0, got {norm_type!r}. For another norm call unscale_(), "
                "and scale the tensors that grads() returns, in place."
            )
        if not check_number("max_norm", max_norm) > 0:
            raise ArgumentError(f"max_norm: expected a number above 0, got {max_norm}.")
        return self._collect("clip_grad_norm_()").clip(float(max_norm))

    def _collect(self, caller: str) -> StepGradients:
        # values in the state matter to the step, and to the check of parameters that are new
        self._masters.follow(self.state, self.param_groups)
        return self._stage.collect(caller, External.of(self))
