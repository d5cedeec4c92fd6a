"""Adagrad.

Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
Optimization", JMLR 2011; learning-rate decay and epsilon as `torch.optim.Adagrad` has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcore.updates.rule import UpdateRule
from mpcore.updates.square_root import SquareRoot, sqrt32


class AdagradRule(UpdateRule):
    """`torch.optim.Adagrad`, for dense gradients."""

    name = "adagrad"
    optimizers = (torch.optim.Adagrad,)
    columns = ("sign", "l2", "rate", "eps")
    moment_counts = (1,)
    keeps_steps = True
    has_torch_kernel = True
    never_negative = frozenset({"sum"})

    def moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The sum of squares."""
        return ("sum",)

    def first_moments(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """What the sum starts from is an option: of groups that come later nobody has made it."""
        return (float(group["initial_accumulator_value"]),)

    def numbers(self, group: Mapping[str, Any], lr: float) -> tuple[float, ...]:
        """lr, lr_decay, eps, weight_decay, maximize."""
        names = ("lr_decay", "eps", "weight_decay", "maximize")
        return (lr, *(float(group[name]) for name in names))

    def scalars(self, numbers: Sequence[Tensor], t: Tensor) -> tuple[Tensor, ...]:
        """See `UpdateRule.scalars`."""
        lr, lr_decay, eps, weight_decay, maximize = numbers
        return (1 - 2 * maximize, weight_decay, lr / (1 + (t - 1) * lr_decay), eps)

    def apply(
        self,
        grad: Tensor,
        param: Tensor,
        moments: Sequence[Tensor],
        s: Sequence[Tensor],
        sqrt: SquareRoot = sqrt32,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `UpdateRule.apply`."""
        _, l2, rate, eps = s
        grad = grad + param * l2
        total = moments[0] + grad * grad
        return param - (grad * rate) / (sqrt(total) + eps), (total,)

    def update_with_torch(
        self,
        numbers: Sequence[float],
        params: list[Tensor],
        grads: list[Tensor],
        moments: Sequence[list[Tensor]],
        steps: list[Tensor],
    ) -> None:
        """`torch._fused_adagrad_`."""
        lr, lr_decay, eps, weight_decay, maximize = numbers
        torch._fused_adagrad_(
            params,
            grads,
            moments[0],
            steps,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            eps=eps,
            maximize=bool(maximize),
        )
