"""A step over all-zero gradients before training, which makes an optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mpcore._parameters import with_gradient
from mpcore.backends import Backend
from mpcore.gradients import StepGradients
from mpcore.masters import Groups, Masters


def zero_gradients(
    groups: Groups, device_of: Mapping[Tensor, torch.device], masters: Masters, backend: Backend
) -> StepGradients | None:
    """Returns the gradients if there are some and all are zero, else None; syncs with the host.

    `torch.distributed.checkpoint` steps over such gradients once, before training, to make an
    optimizer create its state.

    Args:
        groups: The optimizer's param groups.
        device_of: Where each parameter was when it came to the optimizer.
        masters: Makes and holds the masters.
        backend: Does the passes over gradients.
    """
    params = with_gradient(groups, device_of, masters)
    if not params or any(bool(torch.any(p.grad != 0)) for p in params):  # type: ignore[arg-type]
        return None
    masters.create_for(params)
    return StepGradients(params, masters, backend, torch.ones((), device=params[0].device))
