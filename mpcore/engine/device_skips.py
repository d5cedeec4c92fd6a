"""Which optimizers skip a step on the device, so that the host need not ask."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import Tensor

from mpcore.updates import parts_of


def is_torchs(inner: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is one of torch's own, or a chain of these."""
    return all(type(part).__module__.startswith("torch.optim.") for part in parts_of(inner))


def takes_found_inf(inner: torch.optim.Optimizer, stepped: Iterable[Tensor]) -> bool:
    """Whether an optimizer's next step skips by itself if its attribute `found_inf` is 1.

    Args:
        inner: An optimizer.
        stepped: What it has gradients of.
    """
    if not getattr(inner, "_step_supports_amp_scaling", False):
        return False
    # optimizers of an older protocol take the scaler itself and ignore `found_inf`
    if "grad_scaler" in inspect.signature(inner.step).parameters:
        return False
    # torch's fused SGD leaves momentum buffers uninitialised when its first step overflows
    makes_buffers = any(group.get("momentum", 0) for group in inner.param_groups)
    if not isinstance(inner, torch.optim.SGD) or not makes_buffers:
        return True
    states = [inner.state.get(tensor, {}) for tensor in stepped]
    return all(state.get("momentum_buffer") is not None for state in states)
