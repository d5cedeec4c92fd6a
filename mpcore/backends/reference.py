"""Every backend function in plain PyTorch: the readable oracle, and the default on a CPU.

    unscale:  x = float32(g) * coefficient              one multiply, rounded to nearest even
    cast:     w = clamp(round_to_nearest_even(master))  clamped to the finite maximum of w's dtype
    widen:    master = float32(w)                       exact
    inspect:  overflow, norms and the clip factor       in `_inspection.py`
    scale:    the rule of `mpcore.loss_scale`           on tensors

Float64 tensors are computed in float64, but by `inspect`, which takes none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpcore.backends._inspection import Inspection as Inspection
from mpcore.backends._inspection import inspect as inspect


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


@torch.no_grad()
def widen_into(weights: Sequence[Tensor], masters: Sequence[Tensor]) -> None:
    """Writes 16-bit weights as float32 masters, which is exact; no host sync.

    Args:
        weights: float16 / bfloat16, any shape. Left as they are.
        masters: float32, shapes of `weights`. Overwritten.

    Example:
        >>> master = torch.empty(2)
        >>> widen_into([torch.tensor([1.0, 6e-8]).half()], [master])
        >>> master.tolist()
        [1.0, 5.960464477539063e-08]
    """
    for weight, master in zip(weights, masters, strict=True):
        master.copy_(weight)


@torch.no_grad()
def update_scale_(
    scale: Tensor,
    growth_tracker: Tensor,
    overflows_left: Tensor,
    steps: Tensor,
    skipped_steps: Tensor,
    found_inf: Tensor,
    *,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    min_scale: float,
    max_scale: float,
    hysteresis: int,
) -> None:
    """Follows `mpcore.loss_scale.next_state` in place on the device, without a host sync.

    Args:
        scale: 0-d float32.
        growth_tracker: 0-d int32.
        overflows_left: 0-d int32.
        steps: 0-d int64.
        skipped_steps: 0-d int64.
        found_inf: 0-d; non-zero means overflow.
        growth_factor: See `mpcore.DynamicLossScale`, also for the others.
        backoff_factor: Likewise.
        growth_interval: Likewise.
        min_scale: Likewise.
        max_scale: Likewise.
        hysteresis: Likewise.

    Example:
        >>> scale, steps, skipped = torch.tensor(1024.0), torch.tensor(0), torch.tensor(0)
        >>> tracker, left = (torch.tensor(n, dtype=torch.int32) for n in (0, 1))
        >>> update_scale_(scale, tracker, left, steps, skipped, torch.tensor(1), growth_factor=2.0,
        ...               backoff_factor=0.5, growth_interval=2000, min_scale=1.0,
        ...               max_scale=2.0**24, hysteresis=1)
        >>> scale.item(), steps.item(), skipped.item()
        (512.0, 1, 1)
    """
    bad = found_inf != 0
    steps.add_(1)
    skipped_steps.add_(bad)
    left = (overflows_left - bad.to(torch.int32)).clamp_(min=0)
    tracker = torch.where(bad, 0, growth_tracker + 1)
    grow = tracker >= growth_interval
    lower = (scale * backoff_factor).clamp_(min=min_scale)
    higher = (scale * growth_factor).clamp_(max=max_scale)
    held = torch.where(bad & (left == 0), lower, scale)
    torch.where(grow, higher, held, out=scale)
    torch.where(grow, torch.zeros_like(tracker), tracker, out=growth_tracker)
    torch.where(grow, torch.full_like(left, hysteresis), left, out=overflows_left)
