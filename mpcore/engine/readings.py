"""What an optimizer has counted: numbers on a device, which sync with the host when read."""

from __future__ import annotations

from torch import Tensor

from mpcore.loss_scale import Losses, LossScaleTensors, counter


class Readings:
    """The attributes of `mpcore.MixedPrecisionOptimizer` that say how training went so far."""

    _scale: LossScaleTensors
    _losses: Losses
    _saturated: Tensor

    @property
    def loss_scale(self) -> float:
        """The scale of the next loss, one of `add_loss` aside; reading it syncs with the host."""
        return float(self._scale.scale)

    @property
    def steps(self) -> int:
        """Steps so far, skipped ones included; reading it syncs with the host."""
        return self._count("steps")

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped; syncs."""
        return self._count("skipped_steps")

    @property
    def skips_in_a_row(self) -> int:
        """The last of them, without a clean step between; syncs."""
        return self._count("skips_in_a_row")

    def _count(self, name: str) -> int:
        totals = self._losses.totals
        counters = self._scale.counters if totals is None else totals
        return int(counter(counters, name))

    @property
    def saturated(self) -> int:
        """How often a weight was clamped to the finite maximum; syncs."""
        return int(self._saturated)
