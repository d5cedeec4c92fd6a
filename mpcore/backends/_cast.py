"""`cast_into` and `adopt_` of the reference backend: masters to weights and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def cast_into(
    masters: Sequence[Tensor], weights: Sequence[Tensor], found_inf: Tensor, saturated: Tensor
) -> None:
    """Rounds float32 masters into 16-bit weights unless `found_inf` is set; no host sync.

    Args:
        masters: float32, any shape.
        weights: float16 / bfloat16, shapes of `masters`. Overwritten with the master rounded to
            nearest even; a finite master that would round to infinity becomes the largest finite
            value with its sign; infinities and NaNs stay what they are.
        found_inf: 0-d int32. Non-zero means that nothing is written or counted.
        saturated: 0-d int64. The number of clamped weights is added to it.

    Example:
        >>> weight, count = torch.zeros(2).half(), torch.zeros((), dtype=torch.int64)
        >>> cast_into([torch.tensor([1.0, 7e4])], [weight], torch.tensor(0), count)
        >>> weight.tolist(), count.item()
        ([1.0, 65504.0], 1)
    """
    keep = found_inf != 0
    for master, weight in zip(masters, weights, strict=True):
        rounded = master.to(weight.dtype)
        clamped = torch.isinf(rounded) & torch.isfinite(master)
        largest = torch.finfo(weight.dtype).max
        rounded = torch.where(clamped, rounded.clamp(-largest, largest), rounded)
        torch.where(keep, weight, rounded, out=weight)
        saturated.add_((clamped & keep.logical_not()).sum())


@torch.no_grad()
def adopt_(weights: Sequence[Tensor], masters: Sequence[Tensor], counts: Tensor) -> None:
    """Makes weights that are not their rounded masters the masters, by element; no host sync.

    An element that has the bits of its rounded and clamped master leaves the master as it is; so
    does a NaN whose master is one. Another one becomes its master, unless it is not finite.

    Args:
        weights: float16 / bfloat16, any shape. Left as they are.
        masters: float32, shapes of `weights`. Overwritten where weights differ.
        counts: int64 `[len(weights), 2]`. For each tensor the number of elements that became
            masters, and of those that did not because they are not finite, are added.

    Example:
        >>> master, counts = torch.tensor([1.0001, 2.0, 3.0]), torch.zeros(1, 2, dtype=torch.int64)
        >>> adopt_([torch.tensor([1.0, 5.0, torch.inf]).half()], [master], counts)
        >>> master.tolist(), counts.tolist()
        ([1.000100016593933, 5.0, 3.0], [[1, 1]])
    """
    for weight, master, count in zip(weights, masters, counts.unbind(), strict=True):
        differs = differing(weight, master)
        finite = weight.isfinite()
        adopted = differs & finite
        torch.where(adopted, weight.to(master.dtype), master, out=master)
        count.add_(torch.stack([adopted.sum(), (differs & finite.logical_not()).sum()]))


@torch.no_grad()
def differing(weight: Tensor, master: Tensor) -> Tensor:
    """Returns which elements of a weight are not their rounded masters, as booleans; no host sync.

    NaNs are equal whatever their bits, zeros of two signs are not.
    """
    rounded = torch.empty_like(weight)
    zero = torch.zeros((), dtype=torch.int64, device=weight.device)
    cast_into([master], [rounded], zero, zero.clone())
    other_bits = rounded.view(torch.int16) != weight.view(torch.int16)
    return other_bits & (rounded.isnan() & weight.isnan()).logical_not()
