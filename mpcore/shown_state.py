"""The state that the wrapper shows: what somebody puts into it reaches the wrapped optimizer."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor

State = dict[str, Any]


class ShownState:
    """Knows what was shown last, and so what somebody has changed since. No host sync.

    Values edited in place need no taking over: they are the same tensors.
    """

    def __init__(self) -> None:
        self._ids: list[int] | None = []  # of all values; None: something was added meanwhile
        self._entries: list[tuple[Tensor, State]] = []

    def note(self, shown: dict[Tensor, State]) -> None:
        """Notes what is shown now."""
        self._entries = [(param, dict(state)) for param, state in shown.items()]
        self._ids = _ids(shown)

    def note_one(self, param: Tensor, state: State, *, is_last: bool) -> None:
        """Notes a state that was added; one that is not the last needs `settle` afterwards."""
        if self._ids is not None and is_last:
            self._entries.append((param, dict(state)))
            self._ids += map(id, state.values())
        else:
            self._ids = None

    def settle(self, shown: dict[Tensor, State]) -> None:
        """Notes everything if something was added in the middle."""
        if self._ids is None:
            self.note(shown)

    def is_changed(self, shown: dict[Tensor, State]) -> bool:
        """Whether values were put in, replaced or taken out."""
        return self._ids is not None and _ids(shown) != self._ids

    def take_over(
        self,
        shown: dict[Tensor, State],
        inner_state: dict[Tensor, State],
        master_of: dict[Tensor, Tensor],
    ) -> None:
        """Changes the wrapped optimizer's state, and masters, as what is shown was changed.

        A master that was taken out stays.

        Args:
            shown: By parameter; that of one with a master holds the master too.
            inner_state: By master, or by parameter if it has none.
            master_of: By parameter.
        """
        before = dict(self._entries)
        for param in {**before, **shown}:
            own, was = shown.get(param), before.get(param, {})
            master = master_of.get(param)
            if master is None:
                if own is None:
                    inner_state.pop(param, None)
                elif inner_state.get(param) is not own:
                    inner_state[param] = own
                continue
            own = {} if own is None else own
            state = inner_state.pop(master, {})
            for key in was.keys() - own.keys():
                state.pop(key, None)
            state.update({k: v for k, v in own.items() if k not in was or was[k] is not v})
            new = state.pop("master", master)
            if new is not master:
                new.grad = master.grad  # in the middle of a step it is there already
            master_of[param] = new
            if state:
                inner_state[new] = state


def _ids(shown: dict[Tensor, State]) -> list[int]:
    return list(map(id, chain.from_iterable(map(dict.values, shown.values()))))
