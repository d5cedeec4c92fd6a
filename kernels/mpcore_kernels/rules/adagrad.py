"""Adagrad.

Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
Optimization", JMLR 2011; learning-rate decay and epsilon as `torch.optim.Adagrad` has them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpcore_kernels.rules._rule import Rule


@triton.jit
def adagrad_scalars(numbers, t):
    """Returns sign, l2, rate and epsilon."""
    lr, lr_decay, eps, weight_decay, maximize = numbers
    return 1.0 - 2.0 * maximize, weight_decay, lr / (1.0 + (t - 1.0) * lr_decay), eps


@triton.jit
def adagrad(grad, param, moments, scalars):
    """Moments: the sum of squares."""
    _, l2, rate, eps = scalars
    grad = grad + param * l2
    total = moments[0] + grad * grad
    return param - tl.div_rn(grad * rate, tl.sqrt_rn(total) + eps), (total,)


ADAGRAD = Rule(
    name="adagrad",
    apply=adagrad,
    scalars=adagrad_scalars,
    numbers=("lr", "lr_decay", "eps", "weight_decay", "maximize"),
    columns=4,
    counts_steps={1: True},
)
