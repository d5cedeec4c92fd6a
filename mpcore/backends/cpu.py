"""The default backend for CPU tensors: what the reference backend does, blocked for the cache.

    unscale, cast           the bits of the reference backend
    inspect                 its flags; norms within 1e-6            `_cpu_inspection.py`
    adopt                   the reference backend's
    update                  the bits of `torch.optim`, fused=True   `_cpu_update.py`

Reading a tensor of the host costs nothing, so skips are decided before any work is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpcore.backends import reference
from mpcore.backends._blocks import blocks, copy_all, cut, memory_order, new_scratch, none_reaches
from mpcore.backends._cast import adopt_
from mpcore.backends._cpu_inspection import inspect
from mpcore.backends._cpu_update import plan_update, prepare_, update_
from mpcore.loss_scale import update_scale_

__all__ = [
    "adopt_",
    "cast_into",
    "inspect",
    "plan_update",
    "prepare_",
    "prepares_on_the_way",
    "unscale_",
    "unscale_into",
    "update_",
    "update_scale_",
]

#: See `Backend`.
prepares_on_the_way = False


@torch.no_grad()
def unscale_(grads: Sequence[Tensor], coefficient: Tensor, nonfinite: Tensor) -> None:
    """Multiplies every gradient by `coefficient` in place and flags overflow; CPU tensors.

    Bitwise `mpcore.backends.reference.unscale_`, which documents the arguments.
    """
    flat = [memory_order(grad) for grad in grads]
    if not all(
        _shares(f, g) and g.dtype == torch.float32 for f, g in zip(flat, grads, strict=True)
    ):
        reference.unscale_(grads, coefficient, nonfinite)
        return
    found = torch.zeros(1, device="cpu")
    for block in blocks([grad.numel() for grad in flat]):
        _multiply(cut(flat, block), coefficient, found)
    _flag(flat, coefficient, found, nonfinite)


@torch.no_grad()
def unscale_into(
    grads: Sequence[Tensor], outs: Sequence[Tensor], coefficient: Tensor, nonfinite: Tensor
) -> None:
    """Writes every gradient times `coefficient` to `outs` in float32 and flags; CPU tensors.

    Bitwise `mpcore.backends.reference.unscale_into`, which documents the arguments.
    """
    sources, flat = [memory_order(g) for g in grads], [memory_order(out) for out in outs]
    for grad, out, target in zip(grads, outs, flat, strict=True):
        if not (_alike(grad, out) and _shares(target, out)):
            reference.unscale_into(grads, outs, coefficient, nonfinite)
            return
    found = torch.zeros(1, device="cpu")
    for block in blocks([out.numel() for out in flat]):
        here = cut(flat, block)
        copy_all(here, cut(sources, block))
        _multiply(here, coefficient, found)
    _flag(flat, coefficient, found, nonfinite)


def _multiply(pieces: list[Tensor], coefficient: Tensor, found: Tensor) -> None:
    """Multiplies in place; sets `found` if a value is not finite before."""
    torch._amp_foreach_non_finite_check_and_unscale_(pieces, found, coefficient)


def _flag(flat: Sequence[Tensor], coefficient: Tensor, found: Tensor, nonfinite: Tensor) -> None:
    """Raises the flag of each product that is not finite; looks only if there can be one."""
    # a product can overflow only where it grows
    if bool(found) or not abs(float(coefficient)) <= 1.0:
        for index, values in enumerate(flat):
            if not bool(values.isfinite().all()):
                nonfinite[index] = 1


@torch.no_grad()
def cast_into(
    masters: Sequence[Tensor], weights: Sequence[Tensor], found_inf: Tensor, saturated: Tensor
) -> None:
    """Rounds float32 masters into 16-bit weights unless `found_inf` is set; CPU tensors.

    Bitwise `mpcore.backends.reference.cast_into`, which documents the arguments.
    """
    if bool(found_inf):
        return
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, (master, weight) in enumerate(zip(masters, weights, strict=True)):
        if _alike(weight, master) and _shares(memory_order(weight), weight):
            by_dtype.setdefault(weight.dtype, []).append(index)
        else:
            reference.cast_into([master], [weight], found_inf, saturated)
    for dtype, indices in by_dtype.items():
        sources = [memory_order(masters[index]) for index in indices]
        targets = [memory_order(weights[index]) for index in indices]
        sizes = [target.numel() for target in targets]
        scratch, limit = new_scratch(sizes), torch.finfo(dtype).max
        for block in blocks(sizes):
            held, rounded = cut(sources, block), cut(targets, block)
            if none_reaches(held, scratch, limit):
                copy_all(rounded, held)
            else:
                reference.cast_into(held, rounded, found_inf, saturated)


def _alike(narrow: Tensor, wide: Tensor) -> bool:
    """Whether elements of both lie in the same order, and `wide` alone is computed in float32."""
    same = narrow.stride() == wide.stride() and narrow.shape == wide.shape
    return same and wide.dtype == torch.float32 and narrow.dtype != torch.float64


def _shares(flat: Tensor, tensor: Tensor) -> bool:
    """Whether `memory_order` gave a view of a tensor, which can be written to."""
    return flat.data_ptr() == tensor.data_ptr()
