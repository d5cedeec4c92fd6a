"""The state of a loss scale in tensors of a device, which follow the rule without a host sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpcore.loss_scale.state import COUNTERS, SINGLE, LossScaleState


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
        return LossScaleState(
            scale=float(self.scale),
            growth_tracker=int(self.growth_tracker),
            overflows_left=int(self.overflows_left),
            peak=float(self.peak),
            peak_before=float(self.peak_before),
            **dict(zip(COUNTERS, self.counters.tolist(), strict=True)),
        )

    def assign_(self, state: LossScaleState) -> None:
        """Overwrites every tensor in place with `state`, without a host sync."""
        tensors = {name: getattr(self, name) for name in SINGLE}
        tensors |= dict(zip(COUNTERS, self.counters.unbind(), strict=True))
        # filling happens on the device; torch.tensor would copy from the host
        for name, tensor in tensors.items():
            tensor.fill_(getattr(state, name))

    def every(self) -> list[Tensor]:
        """Returns all of them."""
        single = [self.scale, self.growth_tracker, self.overflows_left]
        return [*single, self.counters, self.peak, self.peak_before]

    def count(self, name: str) -> Tensor:
        """Returns one of the counters, 0-d; no host sync."""
        return counter(self.counters, name)
