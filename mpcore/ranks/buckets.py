"""Sums of gradients side by side in one tensor, so that one collective adds up many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

#: Elements of a bucket, unless one parameter alone has more: 32 MiB in float32.
LARGEST = 2**23


def in_buckets(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields parameters, in order, of one device and one dtype of sums each time.

    Example:
        >>> params = [torch.zeros(2**22), torch.zeros(2**22), torch.zeros(3)]
        >>> [[param.numel() for param in bucket] for bucket in in_buckets(params)]
        [[4194304, 4194304], [3]]
    """
    bucket: list[Tensor] = []
    size = 0
    for param in params:
        size += param.numel()
        if bucket and (size > LARGEST or _kind(param) != _kind(bucket[0])):
            yield bucket
            bucket, size = [], param.numel()
        bucket.append(param)
    if bucket:
        yield bucket


def flat_sums(bucket: Sequence[Tensor], sums: Mapping[Tensor, Tensor]) -> Tensor:
    """Returns the sums of parameters in one tensor, zeros where there is none."""
    device, dtype = _kind(bucket[0])
    parts = [
        sums[param].detach().reshape(-1)
        if param in sums
        else torch.zeros(param.numel(), dtype=dtype, device=device)
        for param in bucket
    ]
    return torch.cat(parts)


def in_pieces(bucket: Sequence[Tensor], flat: Tensor) -> dict[Tensor, Tensor]:
    """Returns what `flat_sums` has put together, each in the layout of its parameter."""
    parts = torch.split(flat, [param.numel() for param in bucket])
    return {
        param: torch.empty_like(param, dtype=flat.dtype, requires_grad=False).copy_(
            part.view(param.shape)
        )
        for param, part in zip(bucket, parts, strict=True)
    }


def _kind(param: Tensor) -> tuple[torch.device, torch.dtype]:
    return param.device, torch.promote_types(param.dtype, torch.float32)
