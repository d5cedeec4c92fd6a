"""Stores: how a tensor lies in memory. One small frozen object for each way.

What is computed is float32 everywhere: a store decodes before an update rule, and encodes after it.
No rule knows of stores, and no store of rules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mpcore.stores.blocks import (
    SHORTEST_ROW,
    decode_blocks,
    encode_blocks,
    row_of,
    scales_shape,
)
from mpcore.stores.rounding import round_randomly, round_to_nearest
from mpcore.stores.split import is_clamped, join, split


class Master(NamedTuple):
    """A float32 number as a store keeps it.

    Attributes:
        weight: The 16-bit weight that the model sees.
        beside: What lies beside it, in shape and strides of the weight; None: nothing.
        clamped: Which numbers were finite and too large, as booleans.
    """

    weight: Tensor
    beside: Tensor | None
    clamped: Tensor


@dataclass(frozen=True)
class MasterStore(ABC):
    """How the float32 master of a 16-bit weight lies in memory.

    Attributes:
        name: What users and batches call it.
        key: Under which name a parameter's state shows what lies beside the weight; None: nothing.
        dtype: Of what lies beside the weight; None: nothing.
        weight_dtypes: Of weights that it can have.
        is_random: Whether weights are rounded at random: batches need steps and keys.
    """

    name: ClassVar[str]
    key: ClassVar[str | None]
    dtype: ClassVar[torch.dtype | None]
    weight_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    is_random: ClassVar[bool] = False

    @property
    def bytes_per_element(self) -> int:
        """What lies beside the weight takes."""
        return 0 if self.dtype is None else self.dtype.itemsize

    @abstractmethod
    def encode(self, value: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> Master:
        """Returns how a float32 number is kept with a weight of `dtype`; no host sync.

        What is kept as it is, is the tensor itself and no copy: that is so of all stores here.

        Args:
            value: float32.
            dtype: One of `weight_dtypes`.
            bits: Random integers from 0 to 65535, its shape, for a store that is random; None:
                rounded to nearest.
        """

    @abstractmethod
    def decode(self, weight: Tensor, beside: Tensor | None) -> Tensor:
        """Returns the float32 number; no host sync."""


class Float32Master(MasterStore):
    """A float32 tensor beside the weight, which is the number rounded to nearest even."""

    name = "float32"
    key = "master"
    dtype = torch.float32

    def encode(self, value: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> Master:
        """See `MasterStore.encode`."""
        largest = torch.finfo(dtype).max
        rounded = value.to(dtype)
        clamped = rounded.isinf() & value.isfinite()
        weight = torch.where(clamped, rounded.clamp(-largest, largest), rounded)
        return Master(weight, value, clamped)

    def decode(self, weight: Tensor, beside: Tensor | None) -> Tensor:
        """See `MasterStore.decode`."""
        return weight.float() if beside is None else beside


class SplitMaster(MasterStore):
    """An int16 remainder beside the weight: see `mpcore.stores.split`."""

    name = "split"
    key = "remainder"
    dtype = torch.int16

    def encode(self, value: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> Master:
        """See `MasterStore.encode`."""
        weight, remainder = split(value, dtype)
        return Master(weight, remainder, is_clamped(value, dtype))

    def decode(self, weight: Tensor, beside: Tensor | None) -> Tensor:
        """See `MasterStore.decode`; without a remainder the weight is all there is."""
        return weight.float() if beside is None else join(weight, beside)


class NoMaster(MasterStore):
    """Nothing: a bfloat16 weight that is rounded stochastically is its own master."""

    name = "none"
    key = None
    dtype = None
    weight_dtypes = (torch.bfloat16,)
    is_random = True

    def encode(self, value: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> Master:
        """See `MasterStore.encode`."""
        rounded = round_to_nearest(value) if bits is None else round_randomly(value, bits)
        return Master(rounded, None, is_clamped(value, dtype))

    def decode(self, weight: Tensor, beside: Tensor | None) -> Tensor:
        """See `MasterStore.decode`."""
        return weight.float()


@dataclass(frozen=True)
class MomentStore(ABC):
    """How a moment lies in memory.

    Attributes:
        name: What batches call it.
        dtype: Of the tensor in the parameter's shape and strides.
        is_random: Whether numbers are rounded at random: batches need steps and keys.
        has_scales: Whether there are scales beside that tensor.
    """

    name: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    is_random: ClassVar[bool] = True
    has_scales: ClassVar[bool] = False

    def scales_shape(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """Returns the shape of the scales of a parameter, float32; None: there are none."""
        return scales_shape(shape) if self.has_scales else None

    @abstractmethod
    def encode(self, value: Tensor, bits: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns how float32 numbers are kept: the tensor, and its scales; no host sync.

        What `decode` returns comes back as the same bits, whatever `bits` are of bfloat16, and
        without any of int8.

        Args:
            value: float32.
            bits: Random integers from 0 to 65535, its shape; None: rounded to nearest.
        """

    @abstractmethod
    def decode(self, held: Tensor, scales: Tensor | None = None) -> Tensor:
        """Returns the float32 numbers; no host sync."""


class Float32Moment(MomentStore):
    """As it is computed."""

    name = "float32"
    dtype = torch.float32
    is_random = False

    def encode(self, value: Tensor, bits: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See `MomentStore.encode`."""
        return value, None

    def decode(self, held: Tensor, scales: Tensor | None = None) -> Tensor:
        """See `MomentStore.decode`."""
        return held


class BFloat16Moment(MomentStore):
    """Rounded stochastically."""

    name = "bfloat16"
    dtype = torch.bfloat16

    def encode(self, value: Tensor, bits: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See `MomentStore.encode`."""
        return round_to_nearest(value) if bits is None else round_randomly(value, bits), None

    def decode(self, held: Tensor, scales: Tensor | None = None) -> Tensor:
        """See `MomentStore.decode`."""
        return held.float()


class Int8Moment(MomentStore):
    """Codes of blocks, with a sign: see `mpcore.stores.blocks`."""

    name = "int8"
    dtype = torch.int8
    has_scales = True

    def encode(self, value: Tensor, bits: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See `MomentStore.encode`."""
        return encode_blocks(value, self.dtype, bits)

    def decode(self, held: Tensor, scales: Tensor | None = None) -> Tensor:
        """See `MomentStore.decode`."""
        if scales is None:
            raise TypeError("scales: expected those of the codes, got None.")
        return decode_blocks(held, scales)


class UInt8Moment(Int8Moment):
    """Codes of blocks of numbers that are never negative."""

    name = "uint8"
    dtype = torch.uint8


#: Every way to keep a master, by its name.
MASTER_STORES: dict[str, MasterStore] = {
    store.name: store for store in (Float32Master(), SplitMaster(), NoMaster())
}
#: Every way to keep a moment, by its name in a batch.
MOMENT_STORES: dict[str, MomentStore] = {
    store.name: store for store in (Float32Moment(), BFloat16Moment(), Int8Moment(), UInt8Moment())
}


def moment_store(
    wanted: str, shape: Sequence[int], stride: Sequence[int], *, negative: bool = True
) -> MomentStore:
    """Returns the store that a moment of a parameter gets.

    Args:
        wanted: "float32", "bfloat16" or "int8". Instead of int8, parameters of one dimension, those
            with fewer than 64 elements for each index of dimension 0, and those whose dimension 0
            is not outermost in memory get bfloat16.
        shape: Of the parameter, or of a shard of dimension 0: both get the same.
        stride: Likewise.
        negative: Whether the moment can be negative; no mean of squares is.

    Example:
        >>> moment_store("int8", (10, 256), (256, 1), negative=False).name
        'uint8'
        >>> moment_store("int8", (256,), (1,)).name
        'bfloat16'
    """
    if wanted != "int8":
        return MOMENT_STORES[wanted]
    row = row_of(shape)
    in_rows = len(shape) > 1 and row >= SHORTEST_ROW and (shape[0] < 2 or stride[0] == row)
    if not in_rows:
        return MOMENT_STORES["bfloat16"]
    return MOMENT_STORES["int8" if negative else "uint8"]
