"""`update_scale_` of the reference backend: the rule of `mpcore.loss_scale` on tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # of tensors, which have no one answer to ==
class ScaleMove:
    """Everything that moves a dynamic loss scale but `found_inf`.

    Args:
        scale: 0-d float32.
        growth_tracker: 0-d int32.
        overflows_left: 0-d int32.
        counters: int64 `[6]`: steps, skipped steps, skips in a row, overflows at the minimum; steps
            since the scale moved, and how many of them overflowed.
        growth_factor: See `mpcore.DynamicLossScale`, also for the others.
        backoff_factor: Likewise.
        growth_interval: Likewise.
        min_scale: Likewise.
        max_scale: Likewise.
        hysteresis: Likewise.
        refill: A sum of what fills `overflows_left` up again besides growth: 1 for a clean step, 2
            for backing off.
        tolerance: (m, n): the scale backs off once m of n steps since it moved overflowed.
    """

    scale: Tensor
    growth_tracker: Tensor
    overflows_left: Tensor
    counters: Tensor
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    min_scale: float
    max_scale: float
    hysteresis: int
    refill: int
    tolerance: tuple[int, int]

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors: what a move writes."""
        return self.scale, self.growth_tracker, self.overflows_left, self.counters


@torch.no_grad()
def count_step_(counters: Tensor, found_inf: Tensor) -> None:
    """Counts a step, whether it was skipped, and skips in a row; no host sync.

    Args:
        counters: As in a `ScaleMove`.
        found_inf: 0-d; non-zero means overflow.

    Example:
        >>> counters = torch.tensor([7, 2, 1, 0, 0, 0])
        >>> count_step_(counters, torch.tensor(1))
        >>> counters[:3].tolist()
        [8, 3, 2]
    """
    bad = (found_inf != 0).to(counters.device)
    steps, skipped, in_a_row = counters.unbind()[:3]
    steps.add_(1)
    skipped.add_(bad)
    in_a_row.add_(1).mul_(bad)


@torch.no_grad()
def update_scale_(move: ScaleMove, found_inf: Tensor) -> None:
    """Follows `mpcore.loss_scale.next_state` in place on the device, without a host sync.

    Args:
        move: The rule, and the tensors that it moves.
        found_inf: 0-d; non-zero means overflow.

    Example:
        >>> scale, counters = torch.tensor(1024.0), torch.zeros(6, dtype=torch.int64)
        >>> tracker, left = (torch.tensor(n, dtype=torch.int32) for n in (0, 1))
        >>> move = ScaleMove(scale, tracker, left, counters, growth_factor=2.0, backoff_factor=0.5,
        ...                  growth_interval=2000, min_scale=1.0, max_scale=2.0**24, hysteresis=1,
        ...                  refill=0, tolerance=(0, 1))
        >>> update_scale_(move, torch.tensor(1))
        >>> scale.item(), counters.tolist()
        (512.0, [1, 1, 1, 0, 0, 0])
    """
    bad = found_inf != 0
    count_step_(move.counters, found_inf)
    at_min, since, overflows = move.counters.unbind()[3:]
    since.add_(1)
    overflows.add_(bad)
    left = (move.overflows_left - bad.to(torch.int32)).clamp_(min=0)
    tracker = torch.where(bad, 0, move.growth_tracker + 1)
    grow = tracker >= move.growth_interval
    # factors that are no float32 numbers are not rounded first: so does torch.amp.GradScaler
    wide = move.scale.double()
    lower = (wide * move.backoff_factor).float().clamp_(min=move.min_scale)
    higher = (wide * move.growth_factor).float().clamp_(max=move.max_scale)
    few, of_steps = move.tolerance
    backs_off = bad & (left == 0) & (overflows * of_steps >= since * few)
    at_min.add_(backs_off & (move.scale <= move.min_scale))
    stays = (grow | backs_off).logical_not()
    since.mul_(stays)
    overflows.mul_(stays)
    held = torch.where(backs_off, lower, move.scale)
    full = grow
    if move.refill & 1:
        full = full | bad.logical_not()
    if move.refill & 2:
        full = full | backs_off
    torch.where(grow, higher, held, out=move.scale)
    torch.where(grow, torch.zeros_like(tracker), tracker, out=move.growth_tracker)
    torch.where(full, torch.full_like(left, move.hysteresis), left, out=move.overflows_left)
