"""`update_scale_` of the reference backend: the rule of `mpcore.loss_scale` on tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaleMove:
    """Everything that moves a dynamic loss scale but `found_inf`: see `update_scale_`."""

    scale: Tensor
    growth_tracker: Tensor
    overflows_left: Tensor
    steps: Tensor
    skipped_steps: Tensor
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    min_scale: float
    max_scale: float
    hysteresis: int
    refill: int

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `update_scale_` by name, `found_inf` left out."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@torch.no_grad()
def update_scale_(
    scale: Tensor,
    growth_tracker: Tensor,
    overflows_left: Tensor,
    steps: Tensor,
    skipped_steps: Tensor,
    found_inf: Tensor,
    *,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    min_scale: float,
    max_scale: float,
    hysteresis: int,
    refill: int,
) -> None:
    """Follows `mpcore.loss_scale.next_state` in place on the device, without a host sync.

    Args:
        scale: 0-d float32.
        growth_tracker: 0-d int32.
        overflows_left: 0-d int32.
        steps: 0-d int64.
        skipped_steps: 0-d int64.
        found_inf: 0-d; non-zero means overflow.
        growth_factor: See `mpcore.DynamicLossScale`, also for the others.
        backoff_factor: Likewise.
        growth_interval: Likewise.
        min_scale: Likewise.
        max_scale: Likewise.
        hysteresis: Likewise.
        refill: A sum of what fills `overflows_left` up again besides growth: 1 for a clean step, 2
            for backing off.

    Example:
        >>> scale, steps, skipped = torch.tensor(1024.0), torch.tensor(0), torch.tensor(0)
        >>> tracker, left = (torch.tensor(n, dtype=torch.int32) for n in (0, 1))
        >>> update_scale_(scale, tracker, left, steps, skipped, torch.tensor(1), growth_factor=2.0,
        ...               backoff_factor=0.5, growth_interval=2000, min_scale=1.0,
        ...               max_scale=2.0**24, hysteresis=1, refill=0)
        >>> scale.item(), steps.item(), skipped.item()
        (512.0, 1, 1)
    """
    bad = found_inf != 0
    steps.add_(1)
    skipped_steps.add_(bad)
    left = (overflows_left - bad.to(torch.int32)).clamp_(min=0)
    tracker = torch.where(bad, 0, growth_tracker + 1)
    grow = tracker >= growth_interval
    # factors that are no float32 numbers are not rounded first: so does torch.amp.GradScaler
    wide = scale.double()
    lower = (wide * backoff_factor).float().clamp_(min=min_scale)
    higher = (wide * growth_factor).float().clamp_(max=max_scale)
    backs_off = bad & (left == 0)
    held = torch.where(backs_off, lower, scale)
    full = grow
    if refill & 1:
        full = full | bad.logical_not()
    if refill & 2:
        full = full | backs_off
    torch.where(grow, higher, held, out=scale)
    torch.where(grow, torch.zeros_like(tracker), tracker, out=growth_tracker)
    torch.where(full, torch.full_like(left, hysteresis), left, out=overflows_left)
