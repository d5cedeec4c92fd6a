"""The state that the wrapper shows: what somebody puts into it reaches the wrapped optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import chain
from operator import is_
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
        self._owners: list[Any] = []  # whose states were shown,
        self._values: list[Any] = []  # the values in all of them,
        self._names: list[Any] = []  # the names of these,
        self._others: Collection[Any] = ()  # and states that are no dictionaries

    def note(self, shown: dict[Tensor, State]) -> None:
        """Notes what is shown now."""
        self._entries = [
            (key, dict(state) if isinstance(state, dict) else state) for key, state in shown.items()
        ]
        states, self._others = _dicts(shown)
        self._owners, self._names = list(shown), list(chain.from_iterable(states))
        self._values = list(chain.from_iterable(map(dict.values, states)))
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
        states, others = _dicts(shown)
        # names too: a state that is moved to another parameter has the same values. As many names
        # are as many values; none of these is compared with `==`, which would compute
        values = chain.from_iterable(map(dict.values, states))
        return not (
            are_same(shown, self._owners)
            and are_same(others, self._others)
            and list(chain.from_iterable(states)) == self._names
            and all(map(is_, values, self._values))
        )

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


def _dicts(shown: Mapping[Any, Any]) -> tuple[Collection[Any], Collection[Any]]:
    """Returns the states that are dictionaries, as they usually all are, and the others."""
    states: Collection[Any] = shown.values()
    if set(map(type, states)) <= {dict}:
        return states, ()
    others = [state for state in states if not isinstance(state, dict)]
    return [state for state in states if isinstance(state, dict)], others
