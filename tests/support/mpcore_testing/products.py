"""Oracles for 16-bit products: NumPy's float64, rounded once; and a witness of what PyTorch ran."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HALF = [torch.float16, torch.bfloat16]
PROBES = 1  # entering `emulate_tensor_cores` multiplies FP32 matrices once, to see how that is done
_WORDS = ("mm", "mv", "dot", "convolution", "attention", "linear", "matmul")


class Recorder(TorchDispatchMode):
    """Keeps (operation, type of its first tensor) for every product that reaches PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(word in name for word in _WORDS):
            self.seen.append((name, tensors[0].dtype))
        return func(*args, **(kwargs or {}))

    def count(self, *dtypes: torch.dtype) -> int:
        return sum(dtype in dtypes for _, dtype in self.seen)


def round16(exact: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Rounds float64 values once, to nearest even, on NumPy's side."""
    if dtype == torch.float16:
        return torch.from_numpy(np.asarray(np.float16(exact)))
    single = np.asarray(exact, np.float64).astype(np.float32)
    assert np.array_equal(single.astype(np.float64), exact), "the oracle would round twice"
    bits = single.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.from_numpy(np.asarray(bits.astype(np.uint16).view(np.int16))).view(torch.bfloat16)


def integers(
    seed: int, *shape: int, dtype: torch.dtype, low: int = -31, high: int = 31
) -> torch.Tensor:
    """Small integers: sums of their products are exact in FP32, and are not in 16 bits."""
    values = np.random.default_rng(seed).integers(low, high + 1, shape)
    return torch.from_numpy(values.astype(np.float32)).to(dtype)


def wide(tensor: torch.Tensor) -> np.ndarray:
    """The values in float64."""
    return tensor.detach().double().numpy()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two 16-bit tensors have one type and the same bits."""
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.int16), b.contiguous().view(torch.int16)
    )
