"""What every part is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpcore_testing.gpu_run.parts import Sizes


@dataclass(frozen=True)
class Setting:
    """Where a part runs and how much it does."""

    device: torch.device
    sizes: Sizes

    @property
    def on_a_gpu(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device.type == "cuda"

    def scalar(self, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A 0-d tensor on the device."""
        return torch.tensor(value, dtype=dtype, device=self.device)
