"""AdamW without master weights, done as well as it can be: only the stored weight is 16-bit.

    w  = float32(weight);   g = float32(gradient) / scale
    m' = b1 * m + (1 - b1) * g;   v' = b2 * v + (1 - b2) * g^2        (float32)
    w' = w * (1 - lr * decay) - lr * m^ / (sqrt(v^) + eps)             (float32)
    weight' = w' rounded to nearest even

Reference: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.loss_scale import LossScale, initial_state, next_state


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW in float32 from the weight as it is stored, rounded back into the weight.

    The comparison for master weights: moments, gradient and arithmetic are float32, the loss is
    scaled, overflows are skipped; all that is missing is the master. `step` syncs with the host.

    Args:
        params: Parameters, any floating dtype of at most 32 bits.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, multiplied by the learning rate.
        loss_scale: How the loss is scaled.

    Example:
        >>> import mpcore
        >>> weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> optimizer = RoundedAdamW(
        ...     [weight], 1e-3, (0.9, 0.95), 1e-8, 0.0, mpcore.NoLossScale()
        ... )
        >>> optimizer.backward(weight.float().sum())
        >>> optimizer.step()
        >>> weight.item()  # 0.999 lies nearer to 1 than to the next bfloat16 below, 0.99609375
        1.0
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        loss_scale: LossScale,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._rule = loss_scale
        self._scale = initial_state(loss_scale)

    @property
    def loss_scale(self) -> float:
        """The scale of the next loss."""
        return self._scale.scale

    @property
    def skipped_steps(self) -> int:
        """How many steps an overflow has cancelled."""
        return self._scale.skipped_steps

    def backward(self, loss: Tensor) -> None:
        """Backpropagates the scaled loss, without a host sync."""
        (loss.float() * self._scale.scale).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient, or none if one of them overflowed; syncs."""
        found = [
            (param, param.grad, group)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        finite = all(bool(gradient.isfinite().all()) for _, gradient, _ in found)
        if finite:
            for param, gradient, group in found:
                self._update(param, gradient.float() / self._scale.scale, group)
        self._scale = next_state(self._rule, self._scale, found_inf=not finite)

    def _update(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        state["step"] += 1
        (beta1, beta2), lr = group["betas"], group["lr"]
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = square.sqrt().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        wide = param.float().mul(1 - lr * group["weight_decay"])
        wide.addcdiv_(mean, root, value=-lr / (1 - beta1 ** state["step"]))
        param.copy_(wide)
