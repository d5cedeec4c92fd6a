"""Masters by parameter, and since when the weights beside them are what they round to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from mpcore.base import any_dtensor, writes_to
from mpcore.masters.fitted import FittedMasters
from mpcore.masters.held_masters import HeldMasters
from mpcore.masters.held_moments import HeldMoments
from mpcore.masters.shared import NEVER, SUSPECT, Sharing


class KeptMasters:
    """What is known of masters without the optimizer. Nothing here syncs with the host.

    Args:
        held: How they lie in memory.
        moments: How moments do.
    """

    def __init__(self, held: HeldMasters, moments: HeldMoments) -> None:
        self.held = held
        self.moments = moments
        self._master_of: dict[Tensor, Tensor] = {}
        #: by id of the key, which keeps it valid: its place in the order of creation
        self._place: dict[int, int] = {}
        #: in that order, the writes that a weight had when its master fitted; NEVER, SUSPECT
        self._seen: list[int] = []
        self.sharing = Sharing()
        #: counts what replaces tensors: plans made of older ones are stale
        self.version = 0
        self._fitted = FittedMasters()
        self._sharded = (-1, False)  # what `any_sharded` was at a version

    def of(self, param: Tensor) -> Tensor:
        """Returns the master of `param`, or `param` itself if it has none.

        The wrapped optimizer knows it by this tensor; its values are those of `value_of`.
        """
        return self._master_of.get(param, param)

    def value_of(self, param: Tensor) -> Tensor:
        """Returns the float32 values of a master, or `param` itself if it has none.

        They are no copy where they lie in memory like that.
        """
        master = self._master_of.get(param)
        return param if master is None else self.held.value_of(param, master)

    def layout_of(self, param: Tensor) -> Tensor:
        """Returns a tensor that has the strides of the master, or of `param` without one."""
        master = self._master_of.get(param)
        return param if master is None else self.held.layout_of(param, master)

    def __len__(self) -> int:
        return len(self._master_of)

    @property
    def any_sharded(self) -> bool:
        """Whether a weight is a DTensor: writes to what this rank holds of it nobody counts."""
        version, sharded = self._sharded
        if version != self.version:
            sharded = any_dtensor(self._master_of)
            self._sharded = self.version, sharded
        return sharded

    def place_of(self, param: Tensor) -> int:
        """Returns which one in the order of creation the master of `param` is."""
        return self._place[id(param)]

    def items(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Returns (parameter, master) pairs in order of creation."""
        return self._master_of.items()

    def value_of_others(self, param: Tensor) -> Tensor:
        """Returns the values of the master of a parameter that another optimizer holds."""
        held = self.sharing.held_by_others(param, self.held.store)
        return self.held.value_of_shared(param, held)

    def shared_in(self, states: dict[Tensor, dict[str, Any]]) -> dict[Tensor, Tensor]:
        """Returns the values of saved masters of parameters whose masters others hold as well.

        Raises:
            ArgumentError: Another optimizer keeps one otherwise.
        """
        saved = {p: self.held.parts(s) for p, s in states.items() if isinstance(p, Tensor)}
        shared = [p for p, s in saved.items() if s and self.sharing.others(p) is not None]
        for param in shared:
            self.sharing.held_by_others(param, self.held.store)
        return {param: self.held.value_in(param, saved[param]) for param in shared}

    def _hold(self, param: Tensor, master: Tensor) -> None:
        self.sharing.hold(param, master, self.held.shared(param, master), self.held.store)

    def note_weights(self) -> None:
        """Notes that all weights are their rounded masters now; no host sync."""
        self._seen = writes_to(self._master_of, sharded=self.any_sharded)
        if self.sharing.links:
            self.sharing.note()
        if self.any_sharded:
            self._fitted.note(self._master_of.items())

    def edited(self) -> list[Tensor]:
        """Returns sharded parameters whose masters somebody wrote to, or replaced; no host sync."""
        if not self.any_sharded:
            return []
        return self._fitted.edited(pair for pair in self.items() if self.held.is_whole(pair[0]))

    def written(self) -> list[Tensor]:
        """Returns the weights that somebody wrote to since their masters fitted; no host sync.

        What bumps no version counter (`.data`, NumPy) is not seen.
        """
        written = self._written()
        return list(filter(self.held.is_whole, written)) if written else written

    def _written(self) -> list[Tensor]:
        writes = writes_to(self._master_of, sharded=self.any_sharded)
        if writes == self._seen and not self.sharing.links:
            return []
        counted = zip(self._master_of, writes, self._seen, strict=True)
        moved = [(param, then) for param, now, then in counted if now != then]
        if not self.sharing.links:
            return [param for param, _ in moved]
        mine = [p for p, then in moved if then in (NEVER, SUSPECT) or not self.sharing.is_fit(p)]
        return list(dict.fromkeys([*mine, *self.sharing.suspects(NEVER, SUSPECT)]))

    def never_fitted(self) -> list[Tensor]:
        """Returns the weights of which nobody knows whether they go with their masters."""
        found = self.sharing.suspects(NEVER) if self.sharing.links else []
        if NEVER in self._seen:
            mine = [p for p, then in zip(self._master_of, self._seen, strict=True) if then == NEVER]
            found = list(dict.fromkeys([*mine, *found]))
        return list(filter(self.held.is_whole, found))

    def note(self, params: Iterable[Tensor]) -> None:
        """Notes that these weights are their rounded masters now; no host sync."""
        params = list(params)
        for param, writes in zip(params, writes_to(params), strict=True):
            self._seen[self._place[id(param)]] = writes
        self.sharing.note(params)
        if self.any_sharded:
            self._fitted.note((param, self.of(param)) for param in params)

    def suspect(self, params: Iterable[Tensor]) -> None:
        """Notes that these weights are not their rounded masters: they are `written`."""
        for param in params:
            self._seen[self._place[id(param)]] = SUSPECT
            self.sharing.doubt(param)
