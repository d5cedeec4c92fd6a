"""What "bitwise equal" means in a test, for tensors and nested optimizer state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpcore_testing.comparisons import TALLY

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """Returns the bit patterns of `tensor` as integers; -0.0 is not 0.0 and a NaN equals itself."""
    return tensor.detach().view(_WORDS[tensor.element_size()])


def same_bits(left: Any, right: Any) -> bool:
    """Whether two values are equal in type, shape, dtype and bits, through dicts and sequences."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        TALLY.add(left.numel())
        same_kind = left.dtype == right.dtype and left.shape == right.shape
        return same_kind and torch.equal(bits(left), bits(right))
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_bits(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_bits, left, right))
    return bool(left == right) or (left != left and right != right)


def rounded(master: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns torch's own rounding of `master` to `dtype`, to nearest even; finite stays finite."""
    value = master.detach().to(dtype)
    if not value.isinf().any():
        return value
    limit = torch.finfo(dtype).max
    escaped = value.isinf() & master.detach().isfinite()
    return torch.where(escaped, value.sign() * limit, value)
