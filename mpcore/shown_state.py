"""The state that the wrapper shows: what somebody puts into it reaches the wrapped optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor

State = dict[str, Any]


class ShownState:
    """Knows what was shown last, and so what somebody has changed since. No host sync.

    Values edited in place need no taking over: they are the same tensors.
    """

    def __init__(self) -> None:
        #: what was shown; None: something was added meanwhile
        self._ids: list[Any] | None = []
        self._entries: list[tuple[Any, Any]] = []

    def note(self, shown: dict[Tensor, State]) -> None:
        """Notes what is shown now."""
        self._entries = [
            (key, dict(state) if isinstance(state, dict) else state) for key, state in shown.items()
        ]
        self._ids = _ids(shown)

    def note_one(self) -> None:
        """Notes that a state was added, and needs `settle` afterwards."""
        self._ids = None

    def settle(self, shown: dict[Tensor, State]) -> None:
        """Notes everything if something was added."""
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
        before: dict[Any, Any] = dict(self._entries)
        for param in {**before, **shown}:
            own, was = shown.get(param), before.get(param, {})
            master = master_of.get(param) if isinstance(param, Tensor) else None
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


def _ids(shown: Mapping[Any, Any]) -> list[Any]:
    """Returns what tells one state from another: whose it is, and each value with its name.

    Values alone would not: a state that is moved to another parameter has the same ones.
    """
    try:  # loops in C: this is asked at every step
        values = list(map(id, chain.from_iterable(map(dict.values, shown.values()))))
        names = list(chain.from_iterable(shown.values()))
    except TypeError:  # somebody keeps what is no dictionary
        own = [state for state in shown.values() if isinstance(state, dict)]
        names = list(chain.from_iterable(own))
        values = list(map(id, [*shown.values(), *(v for state in own for v in state.values())]))
    return [*map(id, shown), *values, *names]
