"""What a fused update works on: tensors in batches, and the numbers of their param groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Tensors that one launch updates: one rule, one device, one combination of dtypes and stores.

    Attributes:
        masters: Dense, any shapes; what is stepped, as `store` keeps it: float32 tensors, or the
            int16 remainders of "split". A parameter that is its own master stands here itself: a
            float32 one, or a bfloat16 one of "none".
        weights: float16 or bfloat16, one dtype, shapes and strides of `masters`; None for
            parameters that are their own masters.
        moments: One list for each moment of the rule, as `moment_stores` say; shapes and strides
            of `masters`.
        steps: 0-d float32 on the device, how many updates each tensor has had; None where neither
            the rule nor a store needs a count.
        groups: The param group of each tensor: its row in `Hyper.numbers`.
        store: How masters are kept: a name in `mpcore.stores.MASTER_STORES`.
        moment_stores: How each moment is kept: names in `mpcore.stores.MOMENT_STORES`. Empty:
            float32, all of them.
        scales: For each moment the scales of its tensors, float32, contiguous, of
            `MomentStore.scales_shape`; None for moments that have none. Empty: none has.
        keys: From `mpcore.stores.key_of`, one for each tensor; None where no store is random.
        offsets: Where each tensor begins in the full one, in elements: not 0 for shards. None: 0.
    """

    masters: Sequence[Tensor]
    weights: Sequence[Tensor] | None
    moments: Sequence[Sequence[Tensor]]
    steps: Sequence[Tensor] | None
    groups: Sequence[int]
    store: str = "float32"
    moment_stores: Sequence[str] = ()
    scales: Sequence[Sequence[Tensor] | None] = ()
    keys: Sequence[int] | None = None
    offsets: Sequence[int] | None = None


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
