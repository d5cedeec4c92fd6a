"""How much of the range of their format the gradients of a step take."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from mpcore.engine import StepGradients


def used_share(gradients: StepGradients, home: torch.device) -> Tensor | None:
    """Returns the largest unscaled gradient over the largest number of its format; no host sync.

    Args:
        gradients: Of a step that has ended.
        home: Where the result shall be, 0-d float64.

    Returns:
        None if nobody looked for the largest, or for sums, which say nothing about the format.
    """
    shares = []
    for look in gradients.findings.looks():
        if look.found.largest is None or not look.params or gradients.accumulated is not None:
            return None
        runs = [(dtype, len(list(some))) for dtype, some in groupby(d for d, _ in look.layouts)]
        parts = torch.split(look.found.largest, [size for _, size in runs])
        shares += [
            part.amax().double().to(home, non_blocking=True) / torch.finfo(dtype).max
            for (dtype, _), part in zip(runs, parts, strict=True)
        ]
    return torch.stack(shares).amax() if shares else None
