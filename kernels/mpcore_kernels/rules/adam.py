"""Adam, AdamW and AMSGrad.

Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1; Loshchilov and
Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2; Reddi, Kale and Kumar, "On
the Convergence of Adam and Beyond", ICLR 2018, algorithm 2. Bias corrections and epsilon stand
where `torch.optim` has them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpcore_kernels.rules._power import power
from mpcore_kernels.rules._rule import Rule


@triton.jit
def adam_scalars(numbers, t):
    """Returns sign, decay, l2, beta1, 1-beta1, beta2, 1-beta2, step size, root and epsilon."""
    lr, beta1, beta2, eps, weight_decay, decoupled, maximize = numbers
    decay = tl.where(decoupled != 0.0, 1.0 - lr * weight_decay, 1.0)
    l2 = tl.where(decoupled != 0.0, 0.0, weight_decay)
    step_size = lr / (1.0 - power(beta1, t))
    root = tl.sqrt(1.0 - power(beta2, t))
    sign = 1.0 - 2.0 * maximize
    return sign, decay, l2, beta1, 1.0 - beta1, beta2, 1.0 - beta2, step_size, root, eps


@triton.jit
def adam(grad, param, moments, scalars):
    """Moments: mean, mean of squares and, for AMSGrad, the largest of those so far."""
    _, decay, l2, beta1, rest1, beta2, rest2, step_size, root, eps = scalars
    grad = grad + param * l2
    param = param * decay
    mean = moments[0] * beta1 + grad * rest1
    square = moments[1] * beta2 + (grad * grad) * rest2
    if len(moments) == 2:
        return param - _step(mean, square, step_size, root, eps), (mean, square)
    else:
        # a NaN on either side stays
        newer = (square >= moments[2]) | (square != square)
        largest = tl.where(newer, square, moments[2])
        return param - _step(mean, largest, step_size, root, eps), (mean, square, largest)


@triton.jit
def _step(mean, square, step_size, root, eps):
    return tl.div_rn(mean * step_size, tl.div_rn(tl.sqrt_rn(square), root) + eps)


ADAM = Rule(
    name="adam",
    apply=adam,
    scalars=adam_scalars,
    numbers=("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled", "maximize"),
    columns=10,
    counts_steps={2: True, 3: True},
)
