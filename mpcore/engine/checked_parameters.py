"""The parameters that have a gradient, checked; what few steps change is compared with the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpcore.base import (
    GradientSet,
    Kinds,
    ParameterSet,
    addresses_of,
    all_in_memory,
    are_same,
    dtypes_in_order,
    have_shapes,
    held_here,
    with_gradient,
)
from mpcore.errors import ArgumentError
from mpcore.masters import Groups, Masters, check_can_be_stepped, name_of


class Collected(NamedTuple):
    """Parameters that have a gradient, and these as they are now; None: they are in no `p.grad`."""

    params: ParameterSet
    grads: GradientSet | None


class CheckedParameters:
    """Finds the parameters that have a gradient, and what is wrong with them; no host sync.

    Args:
        groups: The optimizer's param groups.
        device_of: Where each parameter was when it came to the optimizer.
        masters: Where the masters are.
    """

    def __init__(
        self, groups: Groups, device_of: Mapping[Tensor, torch.device], masters: Masters
    ) -> None:
        self._groups = groups
        self._device_of = device_of
        self._masters = masters
        self._known = ParameterSet()  # that were found right,
        self._version = -1  # with these masters,
        self._held: list[Tensor] = []  # of the same shapes
        self._kinds: tuple[Kinds, Kinds] | None = None  # of both, once they have stayed
        self._grad_kinds: Kinds | None = None  # of their gradients

    def with_gradient(self, caller: str) -> Collected:
        """Returns the parameters that have a gradient, and these.

        Args:
            caller: The method that asks, for messages.

        Raises:
            ArgumentError: One cannot be stepped.
        """
        every = [param for group in self._groups for param in group["params"]]
        params, found = with_gradient(every)
        known = self._are_known(params)
        if known and self._grad_kinds is not None and self._grad_kinds.fit(found):
            grads = GradientSet.of_kinds(found, self._grad_kinds)
            if 0 not in grads.addresses:
                return Collected(self._known, grads)
        grads = GradientSet(found)
        if not (known and grads.are_in_memory):
            self._masters.take_over_values()  # masters that somebody gave them
            self._check(caller, params, grads)
            grads = GradientSet(with_gradient(params)[1])  # some may have been replaced
            if not known:
                self._note(params)
        elif self._grad_kinds is None or self._grad_kinds.are_known:
            self._grad_kinds = Kinds(grads)
            if self._grad_kinds.are_known:
                grads = GradientSet.of_kinds(grads, self._grad_kinds)
        known = known or are_same(params, self._known)  # with all that was found out about them
        return Collected(self._known if known else ParameterSet(params), grads)

    def _are_known(self, params: Sequence[Tensor]) -> bool:
        known, kinds = self._known, self._kinds
        if self._version != self._masters.version or not are_same(params, known):
            return False
        if addresses_of(params, sharded=known.any_dtensor) != known.addresses:
            return False
        if kinds is not None and kinds[0].fit(params) and kinds[1].fit(self._held):
            return True
        same = (
            dtypes_in_order(params) == known.dtypes_in_order
            and have_shapes(params, known.shapes)
            and all(map(Tensor.is_contiguous, params)) == known.are_contiguous
            and have_shapes(self._held, known.shapes)  # `.data = other` of a master
        )
        if same and kinds is None:
            self._kinds = Kinds(params), Kinds(self._held)
        return same

    def _note(self, params: Sequence[Tensor]) -> None:
        if self._version == self._masters.version and are_same(params, self._known):
            self._masters.version += 1  # something about them was replaced: what was planned is old
        last = self._known
        self._known, self._kinds, self._grad_kinds = ParameterSet(), None, None
        if all_in_memory(list(map(held_here, params))):
            now = ParameterSet.as_now(params)
            self._known = last if last.is_as(now) else now
            self._version = self._masters.version
            self._held = list(map(self._masters.of, params))

    def _check(self, caller: str, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        for param, grad in zip(params, grads, strict=True):
            check_can_be_stepped(param, grad, self._groups, self._device_of, self._masters)
            master = self._masters.of(param)
            if param.shape != master.shape:
                raise ArgumentError(
                    f"{caller}: {name_of(param, self._groups)}: expected {list(master.shape)} like "
                    f"its master, got {list(param.shape)}: its data was replaced. Put a new "
                    "Parameter into the param group, and its state into optimizer.state, or delete "
                    "its state there."
                )
