"""The state of a loss scale in tensors of a device, which follow the rule without a host sync."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcore.backends._scale import ScaleMove, count_step_, update_scale_
from mpcore.headroom import HeadroomLossScale, advance_headroom_
from mpcore.loss_scale import (
    COUNTERS,
    REFILLS,
    DynamicLossScale,
    LossScale,
    LossScaleState,
    tolerated,
)


def counter(counters: Tensor, name: str) -> Tensor:
    """Returns the one of `COUNTERS` with that name, 0-d; no host sync."""
    return counters.unbind()[COUNTERS.index(name)]


@dataclass
class LossScaleTensors:
    """A `LossScaleState` in tensors on one device.

    Attributes:
        scale: 0-d float32.
        growth_tracker: 0-d int32.
        overflows_left: 0-d int32.
        counters: int64 `[6]`, in the order of `mpcore.loss_scale.COUNTERS`.
        peak: 0-d float64.
        peak_before: 0-d float64.
    """

    scale: Tensor
    growth_tracker: Tensor
    overflows_left: Tensor
    counters: Tensor
    peak: Tensor
    peak_before: Tensor

    @classmethod
    def from_state(cls, state: LossScaleState, device: torch.device) -> LossScaleTensors:
        """Returns `state` in tensors on `device`, without a host sync."""
        dtypes = (
            torch.float32,
            torch.int32,
            torch.int32,
            torch.int64,
            torch.float64,
            torch.float64,
        )
        sizes: tuple[tuple[int, ...], ...] = ((), (), (), (len(COUNTERS),), (), ())
        tensors = cls(
            *(torch.empty(n, dtype=t, device=device) for n, t in zip(sizes, dtypes, strict=True))
        )
        tensors.assign_(state)
        return tensors

    def to_state(self) -> LossScaleState:
        """Returns the state as Python numbers; syncs with the host."""
        single = float(self.scale), int(self.growth_tracker), int(self.overflows_left)
        state = LossScaleState(*single, *self.counters.tolist())
        return state._replace(peak=float(self.peak), peak_before=float(self.peak_before))

    def assign_(self, state: LossScaleState) -> None:
        """Overwrites every tensor in place with `state`, without a host sync."""
        single = (self.scale, self.growth_tracker, self.overflows_left)
        # filling happens on the device; torch.tensor would copy from the host
        for tensor, value in zip(
            (*single, *self.counters.unbind(), self.peak, self.peak_before), state, strict=True
        ):
            tensor.fill_(value)

    def every(self) -> list[Tensor]:
        """Returns all of them."""
        single = [self.scale, self.growth_tracker, self.overflows_left]
        return [*single, self.counters, self.peak, self.peak_before]

    def count(self, name: str) -> Tensor:
        """Returns one of the counters, 0-d; no host sync."""
        return counter(self.counters, name)

    @torch.no_grad()
    def advance_(
        self,
        loss_scale: LossScale,
        found_inf: Tensor,
        update: Callable[[ScaleMove, Tensor], None] = update_scale_,
        largest: Tensor | None = None,
    ) -> None:
        """Follows `next_state` in place on the device, without a host sync.

        Args:
            loss_scale: The description.
            found_inf: 0-d; non-zero means overflow. int32 for a backend other than the default.
            update: `update_scale_` of a backend.
            largest: 0-d float64, the largest magnitude of unscaled float16 gradients; None: none.
        """
        if isinstance(loss_scale, HeadroomLossScale):
            none = torch.zeros_like(self.peak)
            advance_headroom_(loss_scale, self, found_inf, none if largest is None else largest)
        move = self.move(loss_scale)
        if move is None:
            count_step_(self.counters, found_inf)
        else:
            update(move, found_inf)

    def move(self, loss_scale: LossScale) -> ScaleMove | None:
        """Returns how the scale moves at the end of a step; None if it never does."""
        if not isinstance(loss_scale, DynamicLossScale):
            return None
        return ScaleMove(
            scale=self.scale,
            growth_tracker=self.growth_tracker,
            overflows_left=self.overflows_left,
            counters=self.counters,
            growth_factor=loss_scale.growth_factor,
            backoff_factor=loss_scale.backoff_factor,
            growth_interval=loss_scale.growth_interval,
            min_scale=loss_scale.min_scale,
            max_scale=loss_scale.max_scale,
            hysteresis=loss_scale.hysteresis,
            refill=REFILLS[loss_scale.refill],
            tolerance=tolerated(loss_scale.tolerance),
        )
