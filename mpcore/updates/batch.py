"""What a fused update works on: tensors in batches, and the numbers of their param groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Tensors that one launch updates: one rule, one device, one combination of dtypes.

    Attributes:
        masters: float32, dense, any shapes; what is stepped. A float32 parameter is its own master.
        weights: float16 or bfloat16, one dtype, shapes and strides of `masters`; None for float32
            parameters, which need no rounding.
        moments: One list for each moment of the rule; float32, shapes and strides of `masters`.
        steps: 0-d float32 on the device, how many updates each tensor has had; None where the rule
            needs no count.
        groups: The param group of each tensor: its row in `Hyper.numbers`.
    """

    masters: Sequence[Tensor]
    weights: Sequence[Tensor] | None
    moments: Sequence[Sequence[Tensor]]
    steps: Sequence[Tensor] | None
    groups: Sequence[int]


@dataclass(frozen=True)
class Hyper:
    """The hyper-parameters of all param groups at one step.

    Attributes:
        numbers: One row per param group, as `UpdateRule.numbers` returns it, lr first.
        lrs: Per param group the tensor that holds the learning rate instead, 0-d float32 on the
            device, or None.
    """

    numbers: tuple[tuple[float, ...], ...]
    lrs: tuple[Tensor | None, ...]


def shared_base(tensors: Sequence[Tensor]) -> Tensor | None:
    """Returns the tensor that 0-d `tensors` are all of the elements of, or None.

    Example:
        >>> import torch
        >>> counts = torch.zeros(3)
        >>> shared_base(counts.unbind()) is counts
        True
        >>> shared_base(counts.unbind()[:2]) is None
        True
    """
    base = tensors[0]._base
    if base is None or base.numel() != len(tensors):
        return None
    addresses = {tensor.data_ptr() for tensor in tensors if tensor._base is base}
    return base if len(addresses) == len(tensors) else None
