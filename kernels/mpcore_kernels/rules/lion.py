"""Lion.

Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, algorithm 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpcore_kernels.rules._rule import Rule


@triton.jit
def lion_scalars(numbers, t):
    """Returns sign, decay, beta1, 1-beta1, beta2, 1-beta2 and lr; the step count is of no use."""
    lr, beta1, beta2, weight_decay, maximize = numbers
    decay = 1.0 - lr * weight_decay
    return 1.0 - 2.0 * maximize, decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2, lr


@triton.jit
def lion(grad, param, moments, scalars):
    """Moments: the mean of gradients."""
    _, decay, beta1, rest1, beta2, rest2, lr = scalars
    param = param * decay
    blend = moments[0] * beta1 + grad * rest1
    # zeros of either sign and NaNs have no direction
    direction = tl.where(blend > 0.0, 1.0, tl.where(blend < 0.0, -1.0, 0.0))
    return param - direction * lr, (moments[0] * beta2 + grad * rest2,)


LION = Rule(
    name="lion",
    apply=lion,
    scalars=lion_scalars,
    numbers=("lr", "beta1", "beta2", "weight_decay", "maximize"),
    columns=7,
    counts_steps={1: False},
)
