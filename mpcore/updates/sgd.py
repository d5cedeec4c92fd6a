"""Stochastic gradient descent, with momentum as `torch.optim.SGD` has it.

Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013
(Nesterov's momentum); `torch.optim` multiplies the whole velocity by the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcore.updates.rule import UpdateRule
from mpcore.updates.square_root import SquareRoot, sqrt32


class SGDRule(UpdateRule):
    """`torch.optim.SGD`: momentum, dampening, Nesterov, weight decay.

    The first update of a parameter takes the gradient itself as its velocity. Whether one was the
    first is known from a step count, which `torch.optim.SGD` does not keep: a buffer that exists
    says nothing if the first step overflowed.
    """

    name = "sgd"
    optimizers = (torch.optim.SGD,)
    columns = ("sign", "l2", "momentum", "1-dampening", "first", "nesterov", "lr")
    moment_counts = (0, 1)
    has_torch_kernel = True

    def moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The velocity, if there is momentum."""
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def counts_steps(self, moments: Sequence[str]) -> bool:
        """Only velocities know a first step."""
        return bool(moments)

    def hand_over(self, state: dict[str, Any]) -> None:
        """torch.optim.SGD knows a first step by its missing velocity; syncs with the host."""
        step = state.pop("step", None)
        if step is not None and float(step) == 0:
            state.pop("momentum_buffer", None)

    def numbers(self, group: Mapping[str, Any], lr: float) -> tuple[float, ...]:
        """lr, momentum, dampening, weight_decay, nesterov, maximize."""
        names = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
        return (lr, *(float(group[name]) for name in names))

    def scalars(self, numbers: Sequence[Tensor], t: Tensor) -> tuple[Tensor, ...]:
        """See `UpdateRule.scalars`."""
        lr, momentum, dampening, weight_decay, nesterov, maximize = numbers
        first = torch.where(t == 1, 1.0, 0.0)
        return (1 - 2 * maximize, weight_decay, momentum, 1 - dampening, first, nesterov, lr)

    def apply(
        self,
        grad: Tensor,
        param: Tensor,
        moments: Sequence[Tensor],
        s: Sequence[Tensor],
        sqrt: SquareRoot = sqrt32,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `UpdateRule.apply`."""
        _, l2, momentum, rest, first, nesterov, lr = s
        grad = grad + param * l2
        if not moments:
            return param - grad * lr, ()
        velocity = torch.where(first != 0, grad, moments[0] * momentum + grad * rest)
        step = torch.where(nesterov != 0, grad + velocity * momentum, velocity)
        return param - step * lr, (velocity,)

    def update_with_torch(
        self,
        numbers: Sequence[float],
        params: list[Tensor],
        grads: list[Tensor],
        moments: Sequence[list[Tensor]],
        steps: list[Tensor],
    ) -> None:
        """`torch._fused_sgd_`, for first steps and later ones apart."""
        firsts = [float(step) == 1 for step in steps] if moments else [False] * len(params)
        lr, momentum, dampening, weight_decay, nesterov, maximize = numbers
        for first in set(firsts):
            chosen = [i for i, is_first in enumerate(firsts) if is_first == first]
            torch._fused_sgd_(
                [params[i] for i in chosen],
                [grads[i] for i in chosen],
                [moments[0][i] for i in chosen] if moments else [],
                weight_decay=weight_decay,
                momentum=momentum,
                lr=lr,
                dampening=dampening,
                nesterov=bool(nesterov),
                maximize=bool(maximize),
                is_first_step=first,
            )
