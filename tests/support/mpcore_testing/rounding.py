"""Masters at the edges of what 16 bits can hold, and their rounding without PyTorch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def edge_masters(dtype: torch.dtype) -> Tensor:
    """Every 16-bit value, the midpoints between neighbours, what lies just beside; random bits."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype).double()
    finite = values[torch.isfinite(values)].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    limit = torch.finfo(dtype).max
    step = limit - torch.tensor(limit, dtype=dtype).nextafter(torch.zeros((), dtype=dtype)).double()
    beyond = torch.tensor([limit + step / 2, limit + step, 3.4028234e38], dtype=torch.float64)
    exact = torch.cat([values, middles, beyond, -beyond]).float()
    # int32 neighbours of a float32 are its neighbours
    near = torch.cat([exact.view(torch.int32) + offset for offset in (-1, 0, 1)]).view(
        torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    random = (
        torch.randint(-(2**31), 2**31, (2**18,), generator=generator)
        .to(torch.int32)
        .view(torch.float32)
    )
    return torch.cat([near, random])


def round_by_hand(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """NumPy's float16, and for bfloat16 integer arithmetic on the bits; then clamped."""
    values = master.numpy()
    if dtype == torch.float16:
        words = values.astype(np.float16).view(np.uint16)
        largest = 0x7BFF
    else:
        raw = values.view(np.uint32).astype(np.uint64)
        words = ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)
        largest = 0x7F7F
    clamped = np.isfinite(values) & ((words & 0x7FFF) > largest)
    words = np.where(clamped, (words & 0x8000) | largest, words)
    return torch.from_numpy(words.astype(np.uint16).view(np.int16)), int(clamped.sum())
