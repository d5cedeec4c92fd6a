"""How much of its format the largest gradient takes; known without a sync."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from mpcore.gradients import StepGradients


def largest_share(gradients: StepGradients, device: torch.device) -> Tensor | None:
    """Returns the largest unscaled gradient over the largest number of its format; no host sync.

    Args:
        gradients: Of a step.
        device: Where to put the result, a 0-d float64.

    Returns:
        None if nobody looked, or if they are sums in float32, which say nothing about a format.
    """
    shares = []
    for look in gradients.looks():
        if look.found.largest is None or not look.params or gradients.accumulated is not None:
            return None
        runs = [(dtype, len(list(some))) for dtype, some in groupby(d for d, _ in look.layouts)]
        parts = torch.split(look.found.largest, [size for _, size in runs])
        shares += [
            part.amax().double().to(device, non_blocking=True) / torch.finfo(dtype).max
            for (dtype, _), part in zip(runs, parts, strict=True)
        ]
    return torch.stack(shares).amax() if shares else None
