"""Lion, an optimizer that keeps one moment and steps by a sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from mpcore.base import check_number
from mpcore.errors import ArgumentError


class Lion(torch.optim.Optimizer):
    """Steps every weight by `lr` against the sign of a mean of gradients; no host sync.

        u = beta1 * m + (1 - beta1) * g
        p = p * (1 - lr * weight_decay) - lr * sign(u)
        m = beta2 * m + (1 - beta2) * g

    Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, algorithm 2. They
    take a learning rate 3 to 10 times smaller than AdamW's, and as many times the weight decay.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: The step of every weight, above 0 or equal; a float32 tensor may hold it.
        betas: Coefficients of the two means, from 0 to below 1.
        weight_decay: Decoupled decay, at least 0.
        maximize: Whether to climb instead.

    Raises:
        ArgumentError: A number is out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> weight.grad = torch.tensor([0.5, 0.0, -4.0])
        >>> Lion([weight], lr=0.25).step()
        >>> weight.tolist()
        [0.75, -2.0, 3.25]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        if not isinstance(lr, torch.Tensor) and not check_number("lr", lr) >= 0:
            raise ArgumentError(f"lr: expected a number of at least 0, got {lr!r}.")
        if len(betas) != 2 or not all(0 <= check_number("betas", beta) < 1 for beta in betas):
            raise ArgumentError(f"betas: expected two numbers from 0 to below 1, got {betas!r}.")
        if not check_number("weight_decay", weight_decay) >= 0:
            raise ArgumentError(
                f"weight_decay: expected a number of at least 0, got {weight_decay!r}."
            )
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: Computes the loss again and returns it.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, -param.grad if group["maximize"] else param.grad, group)
        return loss

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
        mean, (beta1, beta2), lr = state["exp_avg"], group["betas"], group["lr"]
        direction = (mean * beta1 + grad * (1 - beta1)).sign_()
        param.mul_(1 - lr * group["weight_decay"]).sub_(direction * lr)
        mean.mul_(beta2).add_(grad, alpha=1 - beta2)
