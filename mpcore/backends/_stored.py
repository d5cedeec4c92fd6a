"""How the tensors of a batch are kept: what a batch has to be, and its elements in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpcore.errors import ArgumentError, BackendError
from mpcore.stores import (
    MASTER_STORES,
    MOMENT_STORES,
    WEIGHT_SITE,
    MasterStore,
    MomentStore,
    offsets_in_memory,
    random_bits,
)
from mpcore.updates import Batch


class Stores(NamedTuple):
    """The stores of a batch.

    Attributes:
        master: Of the masters.
        moments: One for each moment.
    """

    master: MasterStore
    moments: tuple[MomentStore, ...]

    @property
    def are_random(self) -> bool:
        """Whether any rounds at random."""
        return self.master.is_random or any(moment.is_random for moment in self.moments)


def stores_of(batch: Batch) -> Stores:
    """Returns the stores of a batch.

    Raises:
        ArgumentError: There is no store of a name, or not one for each moment.
    """
    names = batch.moment_stores or ("float32",) * len(batch.moments)
    if batch.store not in MASTER_STORES:
        raise ArgumentError(
            f"store: expected one of {', '.join(MASTER_STORES)}, got {batch.store!r}."
        )
    if len(names) != len(batch.moments) or not MOMENT_STORES.keys() >= set(names):
        raise ArgumentError(
            f"moment_stores: expected one of {', '.join(MOMENT_STORES)} for each of "
            f"{len(batch.moments)} moments, got {tuple(names)}."
        )
    return Stores(MASTER_STORES[batch.store], tuple(MOMENT_STORES[name] for name in names))


def is_plain(batch: Batch) -> bool:
    """Whether masters and moments of a batch are float32 tensors."""
    return batch.store == "float32" and set(batch.moment_stores) <= {"float32"}


def check_plain(batches: Sequence[Batch], backend: str, others: str) -> None:
    """Raises `BackendError` where a backend that knows float32 alone is given anything else.

    Args:
        batches: What it is given.
        backend: Its name.
        others: The backends that can do it.
    """
    for batch in batches:
        if not is_plain(batch):
            kept = ", ".join(dict.fromkeys((batch.store, *batch.moment_stores)))
            raise BackendError(
                f"backend: expected one that keeps masters and moments as {kept}, got "
                f'"{backend}", which keeps float32. Pass {others}.'
            )


def check_stores(batch: Batch) -> Stores:
    """Returns the stores of a batch; raises `ArgumentError` unless its tensors are as they say."""
    master, moments = stores = stores_of(batch)
    weights = batch.weights
    if master.dtype == torch.int16 and weights is None:
        raise ArgumentError(f'weights: expected those of store "{master.name}", got None.')
    if master.dtype is None and weights is not None:
        raise ArgumentError(f'weights: expected None with store "{master.name}", got tensors.')
    if master.name != "float32":
        _check_dtypes("masters", batch.masters, master.dtype or torch.bfloat16)
    for index, (moment, tensors) in enumerate(zip(moments, batch.moments, strict=True)):
        if moment.name != "float32":
            _check_dtypes(f"moments[{index}]", tensors, moment.dtype)
        if moment.has_scales:
            _check_scales(index, moment, tensors, batch.scales)
    if stores.are_random and (batch.steps is None or batch.keys is None):
        raise ArgumentError("batch: expected steps and keys for stores that round at random.")
    for name, values in (("keys", batch.keys), ("offsets", batch.offsets)):
        if values is not None and len(values) != len(batch.masters):
            raise ArgumentError(f"{name}: expected one for each of {len(batch.masters)} masters.")
    return stores


def _check_dtypes(name: str, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
    for tensor in tensors:
        if tensor.dtype != dtype:
            raise ArgumentError(f"{name}: expected {dtype} in this store, got {tensor.dtype}.")


def _check_scales(
    index: int,
    store: MomentStore,
    tensors: Sequence[Tensor],
    scales: Sequence[Sequence[Tensor] | None],
) -> None:
    given = scales[index] if index < len(scales) else None
    if given is None or len(given) != len(tensors):
        raise ArgumentError(f"scales[{index}]: expected one tensor for each of {len(tensors)}.")
    for tensor, scale in zip(tensors, given, strict=True):
        shape = store.scales_shape(tensor.shape)
        if tuple(scale.shape) != shape or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise ArgumentError(
                f"scales[{index}]: expected contiguous float32 {shape}, got {scale.dtype} "
                f"{tuple(scale.shape)}."
            )


class Elements(NamedTuple):
    """One tensor of a batch in float32.

    Attributes:
        master: What is stepped.
        moments: In the order of the rule's.
    """

    master: Tensor
    moments: list[Tensor]


def read_elements(batch: Batch, stores: Stores, i: int) -> Elements:
    """Returns tensor `i` of a batch in float32; the tensors themselves where they are kept so."""
    held = batch.masters[i]
    if stores.master.dtype is None:
        master = stores.master.decode(held, None)
    elif batch.weights is None:
        master = held
    else:
        master = stores.master.decode(batch.weights[i], held)
    moments = [
        store.decode(batch.moments[k][i], _scales(batch, k, i))
        for k, store in enumerate(stores.moments)
    ]
    return Elements(master, moments)


def write_elements(
    batch: Batch,
    stores: Stores,
    i: int,
    elements: Elements,
    keep: Tensor,
    saturated: Tensor,
) -> None:
    """Writes tensor `i` of a batch unless `keep` is set, and counts clamped weights; no host sync.

    Args:
        batch: Whose steps have not been counted yet.
        stores: Its stores.
        i: Place of the tensor.
        elements: What it has become.
        keep: 0-d boolean.
        saturated: 0-d int64, added to.
    """

    def write(old: Tensor, new: Tensor) -> None:
        torch.where(keep, old, new, out=old)

    bits = _Draws(batch, stores, i)
    for k, (store, value) in enumerate(zip(stores.moments, elements.moments, strict=True)):
        held, scales = store.encode(value, bits.of(k) if store.is_random else None)
        write(batch.moments[k][i], held)
        old_scales = _scales(batch, k, i)
        if old_scales is not None and scales is not None:
            write(old_scales, scales)
    if batch.weights is None and stores.master.dtype is not None:
        write(batch.masters[i], elements.master)
        return
    weight = (batch.masters if batch.weights is None else batch.weights)[i]
    draws = bits.of(WEIGHT_SITE) if stores.master.is_random else None
    encoded = stores.master.encode(elements.master, weight.dtype, draws)
    write(weight, encoded.weight)
    if encoded.beside is not None:
        write(batch.masters[i], encoded.beside)
    saturated.add_((encoded.clamped & keep.logical_not()).sum())


def _scales(batch: Batch, k: int, i: int) -> Tensor | None:
    given = batch.scales[k] if k < len(batch.scales) else None
    return None if given is None else given[i]


class _Draws:
    """The random bits of one tensor's next update."""

    def __init__(self, batch: Batch, stores: Stores, i: int) -> None:
        if not stores.are_random or batch.steps is None or batch.keys is None:
            return  # nobody draws
        self._key, self._t = batch.keys[i], batch.steps[i] + 1
        first = 0 if batch.offsets is None else batch.offsets[i]
        self._offsets = offsets_in_memory(batch.masters[i], first)

    def of(self, site: int) -> Tensor:
        """Those of one rounding of each element."""
        return random_bits(self._key, self._t, self._offsets, site)
