"""The parameters of one pass, frozen: what follows from them is found out once, while they stay."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from mpcore.base.bulk import are_same, devices_of, dtypes_in_order
from mpcore.base.dtensors import addresses_of, any_dtensor


class ParameterSet(tuple[Tensor, ...]):
    """Parameters in order, and what was found out about them; no host sync.

    A fact is found out when it is first asked for, and holds for the moment of that. Whoever keeps
    a set compares facts with those of now.

    Example:
        >>> params = ParameterSet.of([torch.ones(2), torch.ones(3)])
        >>> params.dtypes, ParameterSet.of(params) is params
        ({torch.float32}, True)
    """

    @classmethod
    def of(cls, params: Iterable[Tensor]) -> ParameterSet:
        """Returns `params` itself if it is such a set, else one of them."""
        return params if isinstance(params, cls) else cls(params)

    @classmethod
    def as_now(cls, params: Iterable[Tensor]) -> ParameterSet:
        """Returns a set whose facts are of now: `params` itself if its memory has stayed."""
        found = cls.of(params)
        if found.addresses != addresses_of(found, sharded=found.any_dtensor):
            found = cls(params)
        _ = found.addresses, found.dtypes_in_order, found.shapes, found.are_contiguous
        return found

    def is_as(self, now: ParameterSet) -> bool:
        """Whether these are the same parameters, of which the same is known."""
        return (
            are_same(self, now)
            and self.addresses == now.addresses
            and self.dtypes_in_order == now.dtypes_in_order
            and self.shapes == now.shapes
            and self.are_contiguous == now.are_contiguous
        )

    @cached_property
    def addresses(self) -> list[int]:
        """Where each, or what this rank holds of it, lies in memory; fails for sparse ones."""
        return addresses_of(self, sharded=self.any_dtensor)

    @cached_property
    def any_dtensor(self) -> bool:
        """Whether one is a DTensor."""
        return any_dtensor(self)

    @cached_property
    def dtypes_in_order(self) -> list[torch.dtype]:
        """The dtype of each."""
        return dtypes_in_order(self)

    @cached_property
    def dtypes(self) -> set[torch.dtype]:
        """Every dtype that occurs."""
        return set(self.dtypes_in_order)

    @cached_property
    def devices(self) -> list[torch.device]:
        """Every device that occurs, in order of appearance."""
        return devices_of(self)

    @cached_property
    def shapes(self) -> list[torch.Size]:
        """The shape of each."""
        return [param.shape for param in self]

    @cached_property
    def are_contiguous(self) -> bool:
        """Whether each lies in memory in the order of its elements."""
        return all(map(Tensor.is_contiguous, self))
