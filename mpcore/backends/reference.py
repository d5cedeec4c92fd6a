"""Every backend function in plain PyTorch: the readable oracle.

    unscale:  x = float32(g) * coefficient              one multiply, rounded to nearest even
    cast:     w = clamp(round_to_nearest_even(master))  clamped to the finite maximum of w's dtype
    adopt:    master = float32(w) where w is not cast(master)
    inspect:  overflow, norms and the clip factor       in `_inspection.py`
    scale:    the rule of `mpcore.loss_scale`           on tensors, in `_scale.py`
    update:   the rules of `mpcore.updates`             in `_update.py`

Float64 tensors are computed in float64, but by `inspect`, which takes none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpcore.backends._cast import adopt_, cast_into
from mpcore.backends._inspection import Inspection, inspect
from mpcore.backends._update import plan_update, prepare_, update_
from mpcore.loss_scale import update_scale_

__all__ = [
    "Inspection",
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
