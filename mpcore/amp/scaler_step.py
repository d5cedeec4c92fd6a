"""What a GradScaler's step did, read lazily: nothing syncs with the host until it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mpcore.amp.scaler_checks import GradCheck
from mpcore.masters import Groups


class ScalerStep:
    """The outcome of one `GradScaler.step`. Each answer syncs with the host when it is read.

    Args:
        found_inf: Flags, 0-d; any that is not 0 skipped the step.
        check: What was found in the gradients.
        groups: The optimizer's param groups, for names.
        scale: 0-d float32, what the gradients were scaled by.
    """

    def __init__(
        self, found_inf: Sequence[Tensor], check: GradCheck, groups: Groups, scale: Tensor
    ) -> None:
        self._found_inf = found_inf
        self._check = check
        self._groups = groups
        self._scale = scale

    @property
    def skipped(self) -> bool:
        """Whether the optimizer was skipped because a gradient was not finite."""
        return any(bool(flag != 0) for flag in self._found_inf)

    @property
    def loss_scale(self) -> float:
        """The scale of the step."""
        return float(self._scale)

    @property
    def flushed(self) -> int:
        """How many values of 16-bit gradients unscaling in place has turned into 0.

        Those gradients took no part in the step. `mpcore.MixedPrecisionOptimizer` unscales into
        float32 and loses none.
        """
        return sum(int(count) for count in self._check.flushed.values())

    def overflowed(self) -> list[str]:
        """Returns the names of the parameters whose gradient was not finite.

        Parameters have names if the optimizer was made from `model.named_parameters()`.
        Otherwise they read "group 0, parameter 17, [768, 768]".
        """
        return self._check.overflowed(self._groups)

    def __repr__(self) -> str:
        return f"ScalerStep(skipped={self.skipped}, loss_scale={self.loss_scale:g})"
