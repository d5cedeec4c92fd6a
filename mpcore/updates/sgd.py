"""Stochastic gradient descent, with momentum as `torch.optim.SGD` has it.

Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013
(Nesterov's momentum); `torch.optim` multiplies the whole velocity by the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpcore.updates.rule import TorchFused, UpdateRule


class SGDRule(UpdateRule):
    """`torch.optim.SGD`: momentum, dampening, Nesterov, weight decay.

    The first update of a parameter takes the gradient itself as its velocity. Whether one was the
    first is known from a step count, which `torch.optim.SGD` does not keep: a buffer that exists
    says nothing if the first step overflowed.
    """

    name = "sgd"
    optimizers = (torch.optim.SGD,)
    columns = ("sign", "l2", "momentum", "1-dampening", "first", "nesterov", "lr")

    def moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The velocity, if there is momentum."""
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def counts_steps(self, moments: Sequence[str]) -> bool:
        """Only velocities know a first step."""
        return bool(moments)

    def numbers(self, group: Mapping[str, Any], lr: float) -> tuple[float, ...]:
        """lr, momentum, dampening, weight_decay, nesterov, maximize."""
        names = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
        return (lr, *(float(group[name]) for name in names))

    def scalars(self, numbers: Sequence[Tensor], t: Tensor) -> tuple[Tensor, ...]:
        """See `UpdateRule.scalars`."""
        lr, momentum, dampening, weight_decay, nesterov, maximize = numbers
        first = (t == 1).double()
        return (1 - 2 * maximize, weight_decay, momentum, 1 - dampening, first, nesterov, lr)

    def apply(
        self, grad: Tensor, param: Tensor, moments: Sequence[Tensor], s: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `UpdateRule.apply`."""
        _, l2, momentum, rest, first, nesterov, lr = s
        grad = grad + param * l2
        if not moments:
            return param - grad * lr, ()
        velocity = torch.where(first != 0, grad, moments[0] * momentum + grad * rest)
        step = torch.where(nesterov != 0, grad + velocity * momentum, velocity)
        return param - step * lr, (velocity,)

    def torch_fused(
        self, group: Mapping[str, Any], numbers: Sequence[float], lr: float | Tensor
    ) -> TorchFused:
        """`torch._fused_sgd_`."""
        _, momentum, dampening, weight_decay, nesterov, maximize = numbers
        return _FusedSGD(lr, momentum, dampening, weight_decay, bool(nesterov), bool(maximize))


@dataclass(frozen=True)
class _FusedSGD(TorchFused):
    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool

    def __call__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        moments: Sequence[list[Tensor]],
        steps: list[Tensor],
    ) -> None:
        """See `TorchFused`; all tensors must agree on whether this is their first step."""
        torch._fused_sgd_(
            params,
            grads,
            moments[0] if moments else [],
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=self.lr,
            dampening=self.dampening,
            nesterov=self.nesterov,
            maximize=self.maximize,
            is_first_step=bool(moments) and float(steps[0]) == 1,
        )
