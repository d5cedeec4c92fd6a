"""The state that the wrapper shows: what somebody puts into it reaches the wrapped optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor

from mpcore.base import are_same

State = dict[str, Any]


class ShownState:
    """Knows what was shown last, and so what somebody has changed since. No host sync.

    Values edited in place need no taking over: they are the same tensors.
    """

    def __init__(self) -> None:
        self._is_noted = True  # False: something was added meanwhile
        self._entries: list[tuple[Any, Any]] = []
        #: what was shown: whose states, their values and the names of these, one after the other
        self._parts: list[Any] = []

    def note(self, shown: dict[Tensor, State]) -> None:
        """Notes what is shown now."""
        self._entries = [
            (key, dict(state) if isinstance(state, dict) else state) for key, state in shown.items()
        ]
        self._parts = list(_parts(shown))
        self._is_noted = True

    def note_one(self) -> None:
        """Notes that a state was added, and needs `settle` afterwards."""
        self._is_noted = False

    def settle(self, shown: dict[Tensor, State]) -> None:
        """Notes everything if something was added."""
        if not self._is_noted:
            self.note(shown)

    def is_changed(self, shown: dict[Tensor, State]) -> bool:
        """Whether values were put in, replaced or taken out."""
        if not self._is_noted:
            return False
        return len(shown) != len(self._entries) or not are_same(_parts(shown), self._parts)

    def take_over(
        self,
        shown: dict[Tensor, State],
        inner_state: dict[Tensor, State],
        master_of: dict[Tensor, Tensor],
        take: Callable[[Tensor, Tensor, State], Tensor],
    ) -> None:
        """Changes the wrapped optimizer's state, and masters, as what is shown was changed.

        A master that was taken out stays.

        Args:
            shown: By parameter; that of one with a master holds the master too.
            inner_state: By master, or by parameter if it has none.
            master_of: By parameter.
            take: Takes a master out of what is shown of a parameter; returns its new key.
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
            new = take(param, master, state)
            if new is not master:
                new.grad = master.grad  # in the middle of a step it is there already
            master_of[param] = new
            if state:
                inner_state[new] = state


def _parts(shown: Mapping[Any, Any]) -> Iterable[Any]:
    """Returns what tells one state from another: whose it is, and each value with its name.

    Values alone would not: a state that is moved to another parameter has the same ones.
    """
    states: Iterable[Any] = shown.values()
    others: list[Any] = []
    if set(map(type, states)) - {dict}:  # somebody keeps what is no dictionary
        others = [state for state in states if not isinstance(state, dict)]
        states = [state for state in states if isinstance(state, dict)]
    values = chain.from_iterable(map(dict.values, states))
    return chain(shown, values, others, chain.from_iterable(states))
