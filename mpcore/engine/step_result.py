"""What a step did, read lazily: nothing syncs with the host until it is asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mpcore.engine.gradients import StepGradients
from mpcore.masters import Overflow


class StepResult:
    """The outcome of one `step()`. Each attribute syncs with the host when it is first read.

    Args:
        found_inf: 0-d; non-zero if the step was skipped.
        gradients: The step's gradients, for their flags, their norm and their scale.
        name_of: Names a parameter.
        scale: 0-d float32, what an outside scaler scaled by; None: the gradients say it.

    Example:
        >>> import torch, mpcore
        >>> weight = torch.nn.Parameter(torch.ones(2).half())
        >>> optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD([weight], lr=0.5))
        >>> optimizer.backward((weight * torch.inf).sum())
        >>> optimizer.step()
        >>> optimizer.last_step.skipped, optimizer.last_step.overflowed()
        (True, ['group 0, parameter 0, [2]'])
    """

    def __init__(
        self,
        found_inf: Tensor,
        gradients: StepGradients,
        name_of: Callable[[Tensor], str],
        scale: Tensor | None = None,
    ) -> None:
        self._found_inf = found_inf
        self._gradients = gradients
        self._name_of = name_of
        self._scale = scale

    @property
    def skipped(self) -> bool:
        """Whether the step was skipped because a gradient was not finite; syncs."""
        return bool(self._found_inf != 0)

    @property
    def grad_norm(self) -> float | None:
        """The unscaled gradients' 2-norm before clipping, None without clipping; syncs."""
        norm = self._gradients.norm
        return None if norm is None else float(norm)

    @property
    def loss_scale(self) -> float:
        """The scale that the step's gradients were unscaled by; syncs."""
        if self._scale is not None:
            return float(self._scale)
        # a power of two: both reciprocals are exact
        return float(self._gradients.unscaled_by.reciprocal())

    def overflowed(self) -> list[str]:
        """Returns the names of the parameters whose gradient was not finite; syncs.

        Parameters have names if the optimizer was made from `model.named_parameters()`.
        Otherwise they read "group 0, parameter 17, [768, 768]".
        """
        return [self._name_of(param) for param, flag in self._gradients.flags() if int(flag)]

    def overflowed_in(self) -> list[Overflow]:
        """Returns the backward passes that overflowed, of those that were accumulated; syncs.

        Gradients that `accumulate` or a loss of `add_loss` added up; empty without them.
        """
        sums = self._gradients.accumulated
        return [] if sums is None else sums.overflows(self._name_of)

    def __repr__(self) -> str:
        return (
            f"StepResult(skipped={self.skipped}, loss_scale={self.loss_scale:g}, "
            f"grad_norm={self.grad_norm})"
        )
