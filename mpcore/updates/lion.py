"""Lion.

Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcore.optim.lion import Lion
from mpcore.updates.rule import UpdateRule
from mpcore.updates.square_root import SquareRoot, sqrt32


class LionRule(UpdateRule):
    """`mpcore.optim.Lion`."""

    name = "lion"
    optimizers = (Lion,)
    columns = ("sign", "decay", "beta1", "1-beta1", "beta2", "1-beta2", "lr")
    moment_counts = (1,)

    def moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The mean of gradients."""
        return ("exp_avg",)

    def counts_steps(self, moments: Sequence[str]) -> bool:
        """Nothing in Lion depends on the number of steps."""
        return False

    def numbers(self, group: Mapping[str, Any], lr: float) -> tuple[float, ...]:
        """lr, beta1, beta2, weight_decay, maximize."""
        beta1, beta2 = group["betas"]
        return (lr, beta1, beta2, float(group["weight_decay"]), float(group["maximize"]))

    def scalars(self, numbers: Sequence[Tensor], t: Tensor) -> tuple[Tensor, ...]:
        """See `UpdateRule.scalars`."""
        lr, beta1, beta2, weight_decay, maximize = numbers
        decay = 1 - lr * weight_decay
        return (1 - 2 * maximize, decay, beta1, 1 - beta1, beta2, 1 - beta2, lr)

    def apply(
        self,
        grad: Tensor,
        param: Tensor,
        moments: Sequence[Tensor],
        s: Sequence[Tensor],
        sqrt: SquareRoot = sqrt32,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `UpdateRule.apply`."""
        _, decay, beta1, rest1, beta2, rest2, lr = s
        param = param * decay
        direction = torch.sign(moments[0] * beta1 + grad * rest1)
        return param - direction * lr, (moments[0] * beta2 + grad * rest2,)
