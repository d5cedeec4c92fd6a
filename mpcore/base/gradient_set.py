"""The gradients of one pass, frozen: what is asked of each of thousands is asked once."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from mpcore.base.bulk import dtypes_of, writes_to
from mpcore.base.kinds import Kinds
from mpcore.base.memory import are_in_memory


class GradientSet(tuple[Tensor, ...]):
    """Gradients in the order of their parameters, and what was found out about them; no host sync.

    A fact is found out when it is first asked for, and holds for the moment of that. Whoever keeps
    a set compares `addresses` and `writes` with those of now.

    Example:
        >>> grads = GradientSet.of([torch.ones(2), torch.ones(3)])
        >>> grads.dtypes, grads.writes, GradientSet.of(grads) is grads
        ({torch.float32}, [0, 0], True)
    """

    kinds: Kinds | None = None  #: of what kinds they are, if somebody knows

    @classmethod
    def of_kinds(cls, grads: Iterable[Tensor], kinds: Kinds) -> GradientSet:
        """Returns a set of gradients that are of these kinds, and takes facts from them."""
        found = cls(grads)
        found.kinds = kinds
        return found

    @classmethod
    def of(cls, grads: Iterable[Tensor]) -> GradientSet:
        """Returns `grads` itself if it is such a set, else one of them."""
        return grads if isinstance(grads, cls) else cls(grads)

    @cached_property
    def dtypes(self) -> set[torch.dtype]:
        """Every dtype that occurs."""
        return dtypes_of(self) if self.kinds is None else self.kinds.dtypes

    @cached_property
    def shapes(self) -> list[torch.Size]:
        """The shape of each."""
        return [grad.shape for grad in self] if self.kinds is None else self.kinds.shapes

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many elements each has."""
        return tuple(map(Tensor.numel, self)) if self.kinds is None else self.kinds.sizes

    @cached_property
    def addresses(self) -> list[int]:
        """Where each lies in memory; fails for sparse ones."""
        return list(map(Tensor.data_ptr, self))

    @cached_property
    def pointers(self) -> array[int]:
        """Likewise, as C has an array of pointers."""
        return array("q", self.addresses)

    @cached_property
    def writes(self) -> list[int]:
        """How often each was written to, as far as autograd knows."""
        return writes_to(self, sharded=self.kinds is None)

    @cached_property
    def refs(self) -> list[weakref.ref[Tensor]]:
        """A weak reference to each."""
        return list(map(weakref.ref, self))

    @cached_property
    def are_in_memory(self) -> bool:
        """Whether the values of each lie at its address."""
        if self.kinds is not None and 0 not in self.addresses:
            return True
        return are_in_memory(self, lambda: self.addresses)

    @cached_property
    def are_contiguous(self) -> bool:
        """Whether each lies in memory in the order of its elements."""
        if self.kinds is not None:
            return self.kinds.are_contiguous
        return all(map(Tensor.is_contiguous, self))
