"""Every backend function in plain PyTorch: the readable oracle, and the default on a CPU.

    unscale:  x = float32(g) * coefficient              one multiply, rounded to nearest even
    cast:     w = clamp(round_to_nearest_even(master))  clamped to the finite maximum of w's dtype

Float64 tensors are computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _raise_flags(nonfinite: Tensor, results: list[Tensor]) -> None:
    if results:
        flags = torch.stack([torch.isfinite(result).all().logical_not() for result in results])
        nonfinite.bitwise_or_(flags.to(nonfinite.dtype))


@torch.no_grad()
def unscale_(grads: Sequence[Tensor], coefficient: Tensor, nonfinite: Tensor) -> None:
    """Multiplies every gradient by `coefficient` in place and flags overflow; no host sync.

    The flag tests what is stored. That covers the loaded value too: an infinity or a NaN times
    any coefficient is not finite.

    Args:
        grads: Gradients, any shape, float16 / bfloat16 / float32 / float64. Overwritten.
        coefficient: 0-d float32, usually 1 / loss_scale.
        nonfinite: int32 of length `len(grads)`. Entry i is set to 1 if gradient i held, or its
            product overflowed to, a non-finite value; never cleared.

    Example:
        >>> grad, flags = torch.tensor([2.0, 4.0]), torch.zeros(1, dtype=torch.int32)
        >>> unscale_([grad], torch.tensor(0.5), flags)
        >>> grad.tolist(), flags.tolist()
        ([1.0, 2.0], [0])
    """
    for grad in grads:
        torch.mul(_wide(grad), coefficient, out=grad)
    _raise_flags(nonfinite, list(grads))


@torch.no_grad()
def unscale_into(
    grads: Sequence[Tensor], outs: Sequence[Tensor], coefficient: Tensor, nonfinite: Tensor
) -> None:
    """Writes every gradient times `coefficient` to `outs` in float32 and flags; no host sync.

    Args:
        grads: Gradients, any shape, float16 / bfloat16 / float32. Left as they are.
        outs: float32, shapes of `grads`. Overwritten.
        coefficient: 0-d float32, usually 1 / loss_scale.
        nonfinite: int32 of length `len(grads)`, raised as by `unscale_`.

    Example:
        >>> grad, out = torch.tensor([2.0, 65504.0]).half(), torch.empty(2)
        >>> unscale_into([grad], [out], torch.tensor(0.5), torch.zeros(1, dtype=torch.int32))
        >>> out.tolist()
        [1.0, 32752.0]
    """
    for grad, out in zip(grads, outs, strict=True):
        torch.mul(_wide(grad), coefficient, out=out)
    _raise_flags(nonfinite, list(outs))


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
