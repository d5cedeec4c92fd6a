"""A copy of a CUDA tensor that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of a CUDA tensor on its way to the host, which does not wait for it.

    Args:
        tensor: On the device.

    Attributes:
        values: Pinned memory of the host; to be read once the copy has arrived.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.values.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tensor.device))

    def has_arrived(self) -> bool:
        """Returns whether `values` can be read."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Returns when `values` can be read; syncs with the device up to the copy."""
        self._event.synchronize()


def comes_late(device: torch.device) -> bool:
    """Returns whether the host hears of a device late: of a CUDA or ROCm one."""
    return device.type == "cuda"


def is_capturing(device: torch.device) -> bool:
    """Returns whether work for a device is being captured into a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
