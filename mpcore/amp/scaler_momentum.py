"""The first velocity of torch's fused SGD, whose step may be skipped.

That optimizer takes new momentum buffers from memory that nobody has written to and leaves the
writing to its kernel. The kernel does nothing where `found_inf` skips, the buffers stay in the
state, and the next step moves the weights by whatever the memory held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def begin_momentum(optimizer: Any) -> list[Tensor]:
    """Gives a fused SGD the buffers that its first step would leave unwritten; no host sync.

    A buffer of -0.0 gives the first step, whenever it is taken, the bits that it should have: the
    velocity becomes momentum * -0.0 + g, which is g, be it +0.0 or -0.0. With dampening later steps
    take (1 - dampening) * g and the first one g: nothing on the device can tell them apart.

    Args:
        optimizer: Any; only torch's fused SGD with momentum is touched.

    Returns:
        Parameters with dampening whose buffer has to go if their first step is skipped.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return []
    dampened = []
    for group in optimizer.param_groups:
        if not group["fused"] or not group["momentum"]:
            continue
        for param in group["params"]:
            if param.grad is None or param.grad.is_sparse:
                continue
            if optimizer.state[param].get("momentum_buffer") is not None:
                continue
            if group["dampening"]:
                dampened.append(param)
            else:
                optimizer.state[param]["momentum_buffer"] = torch.full_like(param.grad, -0.0)
    return dampened
