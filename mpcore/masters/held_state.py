"""The state that a fused step was planned for: whether it is still there, and where it was."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

from torch import Tensor

from mpcore.base import addresses_of, any_dtensor, are_same


class HeldState:
    """The tensors of masters and moments that a plan was made for.

    Args:
        inner_state: Where the wrapped optimizer keeps its state, by master.
    """

    def __init__(self, inner_state: dict[Tensor, dict[str, Any]]) -> None:
        self._inner_state = inner_state
        self._keys: list[Any] = []
        self._states: list[Any] = []
        self._holders: list[dict[str, Any]] = []  # the state that each moment is in,
        self._names: list[str] = []  # its name there,
        self._moments: list[Tensor] = []  # and itself
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []
        self._sharded = False  # whether one is a DTensor

    def add(
        self, masters: Sequence[Tensor], states: Sequence[dict[str, Any]], names: tuple[str, ...]
    ) -> None:
        """Adds masters, and the moments of these names in their states."""
        self._holders += [state for state in states for _ in names]
        self._names += names * len(states)
        moments = [state[name] for state in states for name in names]
        self._moments += moments
        tensors = [*masters, *moments]
        self._tensors += tensors
        self._sharded = self._sharded or any_dtensor(tensors)
        self._addresses += addresses_of(tensors, sharded=self._sharded)
        self._keys, self._states = list(self._inner_state), list(self._inner_state.values())

    @property
    def is_current(self) -> bool:
        """Whether these are still the state, and where they were: `.data = other` moves them."""
        # loops in C, and no hash of a tensor: this is asked at every step
        return (
            are_same(self._inner_state, self._keys)
            and are_same(self._inner_state.values(), self._states)
            and all(map(is_, map(dict.get, self._holders, self._names), self._moments))
            and addresses_of(self._tensors, sharded=self._sharded) == self._addresses
        )
