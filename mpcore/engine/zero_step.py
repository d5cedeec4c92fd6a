"""A step over all-zero gradients before training, which makes an optimizer's state."""

from __future__ import annotations

import torch

from mpcore.backends import Backend
from mpcore.engine.checked_parameters import CheckedParameters
from mpcore.engine.gradients import StepGradients
from mpcore.masters import Masters


def zero_gradients(
    parameters: CheckedParameters, masters: Masters, backend: Backend
) -> StepGradients | None:
    """Returns the gradients if there are some and all are zero, else None; syncs with the host.

    `torch.distributed.checkpoint` steps over such gradients once, before training, to make an
    optimizer create its state.

    Args:
        parameters: The optimizer's.
        masters: Makes and holds the masters.
        backend: Does the passes over gradients.
    """
    params, _ = parameters.with_gradient("step()")
    if not params or any(bool(torch.any(p.grad != 0)) for p in params):  # type: ignore[arg-type]
        return None
    masters.create_for(params)
    return StepGradients(params, masters, backend, torch.ones((), device=params[0].device))
