"""The scales of 8-bit moments, sharded as their parameter is: rows of dimension 0 stay together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpcore.base import held_here
from mpcore.stores import scales_shape


def cover_rows(like: Any) -> bool:
    """Whether what each rank holds of a parameter are whole rows of dimension 0.

    Example:
        >>> cover_rows(torch.zeros(2, 3))
        True
    """
    placements = getattr(like, "placements", ())
    return all(place.is_replicate() or place.is_shard(0) for place in placements)


def new_scales(like: Any) -> Tensor:
    """Returns zeros for the scales of a parameter, placed like it is; no host sync.

    Args:
        like: Has its shape, strides and placements; see `cover_rows`.
    """
    shape = scales_shape(held_here(like).shape)
    here = torch.zeros(shape, dtype=torch.float32, device=like.device)
    if not hasattr(like, "placements"):
        return here
    # here, since not every build of torch has them
    from torch.distributed.tensor import DTensor

    whole = scales_shape(like.shape)
    return DTensor.from_local(
        here,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=torch.Size(whole),
        stride=(whole[1], 1),
    )
