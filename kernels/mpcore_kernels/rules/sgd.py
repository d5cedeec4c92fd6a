"""Stochastic gradient descent, with momentum as `torch.optim.SGD` has it.

Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013
(Nesterov's momentum); `torch.optim` multiplies the whole velocity by the learning rate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpcore_kernels.rules._rule import Rule


@triton.jit
def sgd_scalars(numbers, t):
    """Returns sign, l2, momentum, 1-dampening, whether this is the first step, nesterov and lr."""
    lr, momentum, dampening, weight_decay, nesterov, maximize = numbers
    first = tl.where(t == 1.0, 1.0, 0.0)
    return 1.0 - 2.0 * maximize, weight_decay, momentum, 1.0 - dampening, first, nesterov, lr


@triton.jit
def sgd(grad, param, moments, scalars):
    """Moments: the velocity, if there is momentum."""
    _, l2, momentum, rest, first, nesterov, lr = scalars
    grad = grad + param * l2
    if len(moments) == 0:
        return param - grad * lr, moments
    else:
        velocity = tl.where(first != 0.0, grad, moments[0] * momentum + grad * rest)
        step = tl.where(nesterov != 0.0, grad + velocity * momentum, velocity)
        return param - step * lr, (velocity,)


SGD = Rule(
    name="sgd",
    apply=sgd,
    scalars=sgd_scalars,
    numbers=("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
    columns=7,
    counts_steps={0: False, 1: True},
)
