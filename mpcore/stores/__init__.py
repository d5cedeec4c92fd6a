"""Stores: how masters and moments lie in memory, in plain PyTorch; the oracle of kernels."""

from __future__ import annotations

from mpcore.stores.blocks import BLOCK, row_of, scales_shape
from mpcore.stores.random_bits import WEIGHT_SITE, key_of, offsets_in_memory, random_bits
from mpcore.stores.split import is_clamped, join, split
from mpcore.stores.store import (
    MASTER_STORES,
    MOMENT_STORES,
    Master,
    MasterStore,
    MomentStore,
    moment_store,
)

__all__ = [
    "BLOCK",
    "MASTER_STORES",
    "MOMENT_STORES",
    "WEIGHT_SITE",
    "Master",
    "MasterStore",
    "MomentStore",
    "is_clamped",
    "join",
    "key_of",
    "moment_store",
    "offsets_in_memory",
    "random_bits",
    "row_of",
    "scales_shape",
    "split",
]
