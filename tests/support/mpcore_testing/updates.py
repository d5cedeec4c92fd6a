"""Fused updates in NumPy: float64 per tensor, float32 per element, one operation after the other.

Written from the rules' published definitions and shares no code with mpcore or mpcore_kernels.
"""

from __future__ import annotations

import numpy as np
import torch

from mpcore_testing.kernels import assert_same_bits
from mpcore_testing.rounding import round_by_hand

F32, F64 = np.float32, np.float64


def power(base, exponent):
    """By squaring, in float64: the result takes a square, then the square is squared."""
    result, base = F64(1), F64(base)
    for bit in range(32):
        if exponent >> bit & 1:
            result = result * base
        base = base * base
    return result


def adam_scalars(numbers, t):
    lr, beta1, beta2, eps, weight_decay, decoupled, maximize = map(F64, numbers)
    return [
        F64(-1 if maximize else 1),
        1 - lr * weight_decay if decoupled else F64(1),
        F64(0) if decoupled else weight_decay,
        *(beta1, 1 - beta1, beta2, 1 - beta2),
        lr / (1 - power(beta1, t)),
        np.sqrt(1 - power(beta2, t)),
        eps,
    ]


def adam_apply(g, p, moments, s):
    _, decay, l2, beta1, rest1, beta2, rest2, step_size, root, eps = s
    m, v, *largest = moments
    g = g + p * l2
    p = p * decay
    m = m * beta1 + g * rest1
    v = v * beta2 + (g * g) * rest2
    u = v
    if largest:
        # NumPy's maximum passes NaNs on, like torch's
        largest = [np.maximum(largest[0], v)]
        u = largest[0]
    return p - (m * step_size) / (np.sqrt(u) / root + eps), [m, v, *largest]


def sgd_scalars(numbers, t):
    lr, momentum, dampening, weight_decay, nesterov, maximize = map(F64, numbers)
    sign = F64(-1 if maximize else 1)
    return [sign, weight_decay, momentum, 1 - dampening, F64(t == 1), nesterov, lr]


def sgd_apply(g, p, moments, s):
    _, l2, momentum, rest, first, nesterov, lr = s
    g = g + p * l2
    if not moments:
        return p - g * lr, []
    buffer = g if first else moments[0] * momentum + g * rest
    step = g + buffer * momentum if nesterov else buffer
    return p - step * lr, [buffer]


def adagrad_scalars(numbers, t):
    lr, lr_decay, eps, weight_decay, maximize = map(F64, numbers)
    rate = lr / (1 + (F64(t) - 1) * lr_decay)
    return [F64(-1 if maximize else 1), weight_decay, rate, eps]


def adagrad_apply(g, p, moments, s):
    _, l2, rate, eps = s
    g = g + p * l2
    total = moments[0] + g * g
    return p - (g * rate) / (np.sqrt(total) + eps), [total]


def lion_scalars(numbers, t):
    lr, beta1, beta2, weight_decay, maximize = map(F64, numbers)
    sign, decay = F64(-1 if maximize else 1), 1 - lr * weight_decay
    return [sign, decay, beta1, 1 - beta1, beta2, 1 - beta2, lr]


def lion_apply(g, p, moments, s):
    _, decay, beta1, rest1, beta2, rest2, lr = s
    p = p * decay
    u = moments[0] * beta1 + g * rest1
    direction = (u > 0).astype(F32) - (u < 0).astype(F32)
    return p - direction * lr, [moments[0] * beta2 + g * rest2]


ORACLES = {
    "adam": (adam_scalars, adam_apply),
    "sgd": (sgd_scalars, sgd_apply),
    "adagrad": (adagrad_scalars, adagrad_apply),
    "lion": (lion_scalars, lion_apply),
}


def widened(tensor):
    """The float32 values of a tensor as a NumPy array, in the tensor's own order of memory."""
    flat = _flat(tensor)
    if tensor.dtype == torch.bfloat16:
        return (flat.view(torch.int16).numpy().astype(np.int32) << 16).view(F32)
    return flat.numpy().astype(F32)


def _flat(tensor):
    """The elements of a dense tensor as they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def rounded(master, dtype):
    """Bits of float32 values rounded to 16 bits, saturating, and how many were clamped."""
    words, clamped = round_by_hand(master, dtype)
    quiet = 0x7E00 if dtype == torch.float16 else 0x7FC0
    return torch.where(master.isnan(), quiet, words).to(torch.int16), clamped


def update(rule, batches, grads, hyper, coefficient, found_inf=0):
    """Updates `batches`, which are on the CPU, in place; returns how many weights were clamped."""
    if found_inf:
        return 0
    scalars_of, apply = ORACLES[rule]
    clamped = 0
    with np.errstate(all="ignore"):
        for batch, batch_grads in zip(batches, grads, strict=True):
            for i, (master, grad) in enumerate(zip(batch.masters, batch_grads, strict=True)):
                t = 1 if batch.steps is None else int(batch.steps[i].item()) + 1
                lr = hyper.lrs[batch.groups[i]]
                numbers = list(hyper.numbers[batch.groups[i]])
                numbers[0] = numbers[0] if lr is None else lr.item()
                s = [F32(value) for value in scalars_of(numbers, t)]
                g = (widened(grad) * F32(coefficient)) * s[0]
                moments = [moment[i] for moment in batch.moments]
                p, after = apply(g, widened(master), [widened(m) for m in moments], s)
                for tensor, values in zip((master, *moments), (p, *after), strict=True):
                    _flat(tensor).copy_(torch.from_numpy(values))
                if batch.steps is not None:
                    batch.steps[i].fill_(float(F32(t)))
                if batch.weights is not None:
                    words, count = rounded(_flat(master), batch.weights[i].dtype)
                    _flat(batch.weights[i]).view(torch.int16).copy_(words)
                    clamped += count
    return clamped


def assert_same_batches(actual, expected):
    """Fails unless all tensors hold the same bits, up to the payload of NaNs."""
    for a, e in zip(actual, expected, strict=True):
        for one, other in zip(a.everything(), e.everything(), strict=True):
            assert one.stride() == other.stride()
            assert_same_bits(one, other)
