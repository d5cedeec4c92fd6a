"""What is wrong with a model's tensors; asked when a step was skipped, so syncs are fine."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Returns the names of floating tensors that hold a value that is not finite; syncs.

    Example:
        >>> not_finite([("a", torch.ones(2)), ("b", torch.tensor([1.0, torch.nan]))])
        ['b']
    """
    return [
        name for name, t in named if t.is_floating_point() and not bool(torch.isfinite(t).all())
    ]


@torch.no_grad()
def large_weights(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Returns the names of float16 tensors with a magnitude of 2^15 or more; syncs.

    65504 is the largest; nothing that a model learns comes near it by accident.

    Example:
        >>> large_weights([("a", torch.ones(2).half()), ("b", torch.full((2,), 4e4).half())])
        ['b']
    """
    return [
        name
        for name, t in named
        if t.dtype == torch.float16 and t.numel() and bool(t.abs().amax() >= 2.0**15)
    ]
