"""Moments in 8 bits: blocks of 256 numbers with a scale, companded by a square root.

    w = sqrt(|x|)            s = the largest w of the block, float32
    t = w * (N / s)          N = 127 beside a sign; 255 where no number is negative
    q = floor(t) or the integer above it, so that x is right on average
    x = (s * (q / N))^2      with the sign of x

The square root gives small numbers more codes than large ones. FlashOptim (arXiv 2602.23349) does
so for second moments; for first ones its 2y / (1 + |y|) is as fine at the top and coarser near 0.
The scale is that of a root: neither infinite nor 0 for any float32 number but 0.

Codes are chosen at random in the numbers' own terms: `q + 1` has probability
(t^2 - q^2) / (2 q + 1), so that the mean of what is read back does not drift from step to step. A
draw is the middle of its 65536th part. Were it the lower end, each step would add half a part:
small second moments of beta2 = 0.999 would be a percent too large.
Among numbers that are never negative one above 0 never becomes 0, since roots of them divide: those
below the first code are overestimated, and their parameters take smaller steps.

Blocks begin anew at each row of dimension 0, so that shards of it have the blocks of the whole. A
block with a number that is not finite is NaN as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Numbers that share a scale.
BLOCK = 256
#: Rows of fewer numbers are not kept in blocks: a scale for each would take back what 8 bits save.
SHORTEST_ROW = 64


def row_of(shape: Sequence[int]) -> int:
    """Returns how many elements there are for each index of dimension 0.

    Example:
        >>> row_of((2, 3, 4)), row_of((5,))
        (12, 1)
    """
    return math.prod(shape[1:])


def scales_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Returns the shape of the scales of a tensor: rows of dimension 0, blocks of each.

    Example:
        >>> scales_shape((10, 300))
        (10, 2)
    """
    return (shape[0], -(-row_of(shape) // BLOCK))


@torch.no_grad()
def encode_blocks(
    value: Tensor, dtype: torch.dtype, bits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of float32 numbers; no host sync.

    Args:
        value: float32, at least two dimensions, dense, dimension 0 outermost in memory.
        dtype: int8, or uint8 where no number is negative (signs are dropped).
        bits: Random integers from 0 to 65535, its shape; None: the nearer of both codes.

    Returns:
        Codes in shape and strides of `value`; scales, float32, of `scales_shape`.
    """
    most = torch.iinfo(dtype).max
    blocks = _in_blocks(value)
    roots = blocks.abs().double().sqrt().float()  # rounded once: see `mpcore.updates.sqrt32`
    scales = roots.amax(dim=2)
    finite = scales.isfinite()
    # a division: torch would multiply `most / scales` from a reciprocal
    inverse = torch.full_like(scales, most) / scales
    inverse = torch.where(finite & (scales > 0), inverse, 0.0)
    t = torch.where(finite.unsqueeze(2), roots, 0.0) * inverse.unsqueeze(2)
    draws = torch.full_like(t, 0.5) if bits is None else (_in_blocks(bits.float()) + 0.5) * 2.0**-16
    lower = t.floor()
    up = draws * (lower + lower + 1) < (t - lower) * (t + lower)
    codes = (lower + up).clamp(max=most)
    if dtype == torch.uint8:
        codes = torch.where(t > 0, codes.clamp(min=1), codes)
    else:
        codes = torch.where(blocks < 0, -codes, codes)
    scales = torch.where(finite, scales, torch.nan)
    return _out_of_blocks(codes.to(dtype), value), scales


@torch.no_grad()
def decode_blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """Returns the float32 numbers of codes, in their shape and strides; no host sync.

    Args:
        codes: int8 or uint8, from `encode_blocks`.
        scales: From there as well.

    Example:
        >>> codes, scales = encode_blocks(torch.tensor([[4.0, -1.0, 0.0]]), torch.int8)
        >>> codes.tolist(), scales.tolist(), decode_blocks(codes, scales)[0, 0].item()
        ([[127, -63, 0]], [[2.0]], 4.0)
    """
    most = torch.iinfo(codes.dtype).max
    values = _in_blocks(codes).float()
    roots = scales.unsqueeze(2) * (values.abs() * torch.tensor(1 / most))
    squares = roots * roots
    return _out_of_blocks(torch.where(values < 0, -squares, squares), codes)


def _rows(tensor: Tensor) -> Tensor:
    """Returns a tensor as it lies in memory, by rows of dimension 0."""
    return tensor.as_strided((tensor.shape[0], row_of(tensor.shape)), (row_of(tensor.shape), 1))


def _in_blocks(tensor: Tensor) -> Tensor:
    """Returns a tensor as `[rows, blocks, BLOCK]`, with zeros behind the end of each row."""
    rows, count = scales_shape(tensor.shape)
    padded = torch.nn.functional.pad(_rows(tensor), (0, count * BLOCK - row_of(tensor.shape)))
    return padded.view(rows, count, BLOCK)


def _out_of_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """Returns blocks without what was added behind rows, in shape and strides of a tensor."""
    result = torch.empty_strided(like.shape, like.stride(), dtype=blocks.dtype, device=like.device)
    _rows(result).copy_(blocks.flatten(1)[:, : row_of(like.shape)])
    return result
