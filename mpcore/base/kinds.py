"""Of what kind tensors are: type, dtype, device, shape and strides of thousands, asked at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpcore.base.dtensors import PLAIN

# what guards compiled functions compares all of this in one call, at a tenth of the time that
# Python takes to ask for each; private to torch, so that builds without it are to work as well
_GUARDS: Any = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)


class Kinds:
    """The kinds of some plain tensors in memory, to be recognised again; no host sync.

    Kinds that are found to be the same are the same. Those that are not found to be so may be it:
    under autocast or in inference mode, where a tensor is there twice, and in releases of torch
    that do not offer the comparison. Whoever asks then has to look at each.

    Args:
        tensors: Parameters or plain tensors, strided, each with memory of its own.

    Example:
        >>> kinds = Kinds([torch.ones(2, 3), torch.ones(4)])
        >>> kinds.fit([torch.zeros(2, 3), torch.zeros(4)])
        True
        >>> kinds.fit([torch.zeros(3, 2), torch.zeros(4)]), kinds.fit([torch.zeros(2, 3)])
        (False, False)
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.dtypes = {tensor.dtype for tensor in tensors}
        self.shapes = [tensor.shape for tensor in tensors]
        self.sizes = tuple(tensor.numel() for tensor in tensors)
        self.are_contiguous = all(map(Tensor.is_contiguous, tensors))
        #: dtype and strides of each
        self.layouts = tuple((tensor.dtype, tensor.stride()) for tensor in tensors)
        self._count = len(tensors)
        self._guards = None
        if _GUARDS is not None and tensors and set(map(type, tensors)) <= PLAIN:
            self._guards = _GUARDS(
                *tensors,
                dynamic_dims_sizes=[list(shape) for shape in self.shapes],
                dynamic_dims_strides=[list(stride) for _, stride in self.layouts],
            )
        #: whether they are recognised at all
        self.are_known = self.fit(tensors)

    def fit(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors are known to be of the same kinds, in order."""
        if self._guards is None or len(tensors) != self._count:
            return False
        known: bool = self._guards.check(*tensors)
        return known
