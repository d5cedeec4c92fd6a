"""What C has to know of the stores of a batch: their numbers, scales, rows, and random bits."""

from __future__ import annotations

import ctypes
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcore.backends._c_compiler import declared
from mpcore.backends._c_work import DTYPES, Work, addresses_of
from mpcore.backends._stored import Stores
from mpcore.stores import row_of
from mpcore.updates import Batch

#: What C calls stores of masters, and of moments.
_MASTERS = {"float32": 0, "split": 1, "none": 2}
_MOMENTS = {"float32": 0, "bfloat16": 1, "int8": 2, "uint8": 3}
# 32-bit numbers that random bits of a tensor are made of
_DRAWS = 4


@dataclass(frozen=True)
class Held:
    """What stays the same from step to step.

    Attributes:
        stores: Of the batch.
        rows: Elements for each index of dimension 0 of each tensor, if blocks begin anew there.
        scales: Addresses of scales, one role after the other; 0 where there are none.
        keys: Of the tensors' random bits.
        offsets: Where tensors begin in the full ones.
    """

    stores: Stores
    rows: array[int]
    scales: array[int]
    keys: array[int]
    offsets: array[int]

    @staticmethod
    def of(batch: Batch, stores: Stores) -> Held:
        """Returns what C has to know of a batch."""
        count, scales = len(batch.masters), array("q")
        rows = array("q")
        if any(store.has_scales for store in stores.moments):
            rows.extend(max(1, row_of(master.shape)) for master in batch.masters)
        for index, store in enumerate(stores.moments):
            given = batch.scales[index] if store.has_scales else None
            scales.extend([0] * count if given is None else addresses_of(given))
        keys = array("Q", batch.keys if stores.are_random and batch.keys is not None else ())
        return Held(stores, rows, scales, keys, array("q", batch.offsets or [0] * count))

    @property
    def own_dtype(self) -> int:
        """What C calls the dtype of parameters that are their own masters."""
        return DTYPES[torch.float32 if self.stores.master.dtype else torch.bfloat16]

    def own_weights(self, masters: int) -> int | None:
        """Returns where weights are that are their own masters; None: there are none of 16 bits."""
        return masters if self.stores.master.dtype is None else None

    def put_into(self, work: Work) -> tuple[array[int], ...]:
        """Tells C of the stores; returns memory that has to stay alive."""
        work.store = _MASTERS[self.stores.master.name]
        for index, store in enumerate(self.stores.moments):
            work.moment_stores[index] = _MOMENTS[store.name]
        work.scales = self.scales.buffer_info()[0]
        work.rows = self.rows.buffer_info()[0] if self.rows else None
        work.offsets = self.offsets.buffer_info()[0]
        sites = [index for index, store in enumerate(self.stores.moments) if store.is_random]
        sites += [3] if self.stores.master.is_random else []
        work.words = sum({1 << site // 2 for site in sites})
        return (self.scales, self.rows, self.offsets)

    def draw_into(self, work: Work, batch: Batch, counts: Tensor | None) -> Tensor | None:
        """Tells C of the random bits of an update; returns memory that has to stay alive.

        Args:
            work: Is told.
            batch: Whose steps count this update already.
            counts: Its steps as one tensor, if they lie in one.
        """
        if not self.keys:
            return None
        if counts is None:
            counts = torch.stack(list(batch.steps or ()))
        wide = counts.double()
        draws = torch.empty(len(self.keys), _DRAWS, dtype=torch.int32, device="cpu")
        fill = declared("fill_draws", None, ctypes.c_int64, *[ctypes.c_void_p] * 3)
        fill(len(self.keys), self.keys.buffer_info()[0], wide.data_ptr(), draws.data_ptr())
        work.draws = draws.data_ptr()
        return draws
