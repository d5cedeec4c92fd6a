"""Adam, AdamW and AMSGrad.

Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1; Loshchilov
and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2; Reddi, Kale and Kumar,
"On the Convergence of Adam and Beyond", ICLR 2018, algorithm 2. Bias corrections and epsilon stand
where `torch.optim` has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcore.updates.rule import UpdateRule, power
from mpcore.updates.square_root import SquareRoot, sqrt32, sqrt64


class AdamRule(UpdateRule):
    """`torch.optim.Adam` and `AdamW`: L2 or decoupled decay, with or without AMSGrad."""

    name = "adam"
    optimizers = (torch.optim.Adam, torch.optim.AdamW)
    columns = (
        *("sign", "decay", "l2", "beta1", "1-beta1", "beta2", "1-beta2"),
        *("step_size", "root", "eps"),
    )
    moment_counts = (2, 3)
    keeps_steps = True
    has_torch_kernel = True
    never_negative = frozenset({"exp_avg_sq", "max_exp_avg_sq"})

    def why_not(self, group: Mapping[str, Any]) -> str | None:
        """Early releases of torch did not say in a group whether the decay is decoupled."""
        if "decoupled_weight_decay" not in group:
            return "the param group has no decoupled_weight_decay"
        return super().why_not(group)

    def moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Two, and the largest second moment so far with AMSGrad."""
        third = ("max_exp_avg_sq",) if group["amsgrad"] else ()
        return ("exp_avg", "exp_avg_sq", *third)

    def numbers(self, group: Mapping[str, Any], lr: float) -> tuple[float, ...]:
        """lr, beta1, beta2, eps, weight_decay, decoupled, maximize."""
        decoupled, maximize = group["decoupled_weight_decay"], group["maximize"]
        beta1, beta2 = group["betas"]
        options = (group["eps"], group["weight_decay"], decoupled, maximize)
        return (lr, float(beta1), float(beta2), *map(float, options))

    def scalars(self, numbers: Sequence[Tensor], t: Tensor) -> tuple[Tensor, ...]:
        """See `UpdateRule.scalars`."""
        lr, beta1, beta2, eps, weight_decay, decoupled, maximize = numbers
        return (
            1 - 2 * maximize,
            torch.where(decoupled != 0, 1 - lr * weight_decay, 1.0),
            torch.where(decoupled != 0, 0.0, weight_decay),
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            lr / (1 - power(beta1, t)),
            sqrt64(1 - power(beta2, t)),
            eps,
        )

    def apply(
        self,
        grad: Tensor,
        param: Tensor,
        moments: Sequence[Tensor],
        s: Sequence[Tensor],
        sqrt: SquareRoot = sqrt32,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `UpdateRule.apply`."""
        _, decay, l2, beta1, rest1, beta2, rest2, step_size, root, eps = s
        grad = grad + param * l2
        param = param * decay
        mean = moments[0] * beta1 + grad * rest1
        square = moments[1] * beta2 + (grad * grad) * rest2
        updated: tuple[Tensor, ...] = (mean, square)
        if len(moments) == 3:
            updated = (mean, square, torch.maximum(moments[2], square))
        return param - (mean * step_size) / (sqrt(updated[-1]) / root + eps), updated

    def update_with_torch(
        self,
        numbers: Sequence[float],
        params: list[Tensor],
        grads: list[Tensor],
        moments: Sequence[list[Tensor]],
        steps: list[Tensor],
    ) -> None:
        """`torch._fused_adamw_` or `torch._fused_adam_`."""
        lr, beta1, beta2, eps, weight_decay, decoupled, maximize = numbers
        kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
        kernel(
            params,
            grads,
            moments[0],
            moments[1],
            moments[2] if len(moments) == 3 else [],
            steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=len(moments) == 3,
            maximize=bool(maximize),
        )
