"""What a GradScaler counts on its device, besides the scale and the growth tracker of torch's."""

from __future__ import annotations

import torch

from mpcore import loss_scale

#: Names in a state_dict: what is left of the hysteresis, the counters of a loss scale, and the
#: peaks of a scale that is computed.
NAMES = (
    "_overflows_left",
    *(f"_{name}" for name in loss_scale.COUNTERS),
    *("_peak", "_peak_before"),
)

Values = tuple[float, ...]


def new_values(hysteresis: int) -> Values:
    """Returns the values of `NAMES` before the first step."""
    return (hysteresis, *(0 for _ in loss_scale.COUNTERS), 0.0, 0.0)


class ScalerCounters:
    """Tensors for the values of `NAMES`.

    Args:
        values: One for each name.
        device: That of the scale.

    Attributes:
        left: 0-d int32.
        counters: int64 `[6]`.
        peak: 0-d float64.
        peak_before: 0-d float64.
    """

    def __init__(self, values: Values, device: torch.device) -> None:
        self.left = torch.empty((), dtype=torch.int32, device=device)
        self.counters = torch.empty(len(loss_scale.COUNTERS), dtype=torch.int64, device=device)
        self.peak = torch.empty((), dtype=torch.float64, device=device)
        self.peak_before = torch.empty_like(self.peak)
        self.fill_(values)

    def fill_(self, values: Values) -> None:
        """Overwrites everything, without a host sync."""
        tensors = (self.left, *self.counters.unbind(), self.peak, self.peak_before)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.fill_(value)

    def values(self) -> Values:
        """Returns the values of `NAMES`; syncs with the host."""
        peaks = float(self.peak), float(self.peak_before)
        return (int(self.left), *self.counters.tolist(), *peaks)
