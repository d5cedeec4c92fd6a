"""From which masters sharded weights were rounded: an edit of a master is not one of its weight."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from mpcore.base import writes_to

#: A parameter and its master.
Pairs = Iterable[tuple[Tensor, Tensor]]


class FittedMasters:
    """Masters as they were when their weights were their rounded values. No host sync."""

    def __init__(self) -> None:
        #: by id of the parameter: its master, and how often that was written to
        self._known: dict[int, tuple[Tensor, int]] = {}

    def note(self, pairs: Pairs) -> None:
        """Notes that these weights are their rounded masters now."""
        pairs = list(pairs)
        writes = writes_to([master for _, master in pairs])
        for (param, master), count in zip(pairs, writes, strict=True):
            self._known[id(param)] = master, count

    def edited(self, pairs: Pairs) -> list[Tensor]:
        """Returns the parameters whose masters somebody wrote to since, or replaced."""
        pairs = list(pairs)
        writes = writes_to([master for _, master in pairs])
        return [
            param
            for (param, master), count in zip(pairs, writes, strict=True)
            if (known := self._known.get(id(param))) is not None
            and (known[0] is not master or known[1] != count)
        ]

    def forget(self) -> None:
        """Forgets them: there are others, whose weights nobody has seen."""
        self._known.clear()
