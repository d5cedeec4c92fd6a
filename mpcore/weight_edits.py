"""Weights that somebody else wrote to: what `step` makes of them.

    an element that is its rounded master     the master keeps its digits
    another one                               becomes the master
    another one that is not finite            does not: an error

Whether a tensor was written to, its version counter tells the host; the rest is found on the
device. What was found is counted there and reaches the host late, as a loss scale's counters do.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, distributed

from mpcore._bulk import devices_of
from mpcore._parameters import name_of
from mpcore.backends import Backend, reference
from mpcore.errors import ArgumentError, StageError
from mpcore.host_copy import HostCopy, comes_late, is_capturing
from mpcore.masters import Groups, Masters

RULES = ("adopt", "always", "raise")


def check_rule(rule: str) -> str:
    """Returns `rule`; raises unless it is one of `RULES`."""
    if rule not in RULES:
        raise ArgumentError(f"on_weight_edit: expected one of {', '.join(RULES)}, got {rule!r}.")
    return rule


class _Counts:
    """What was found on one device, and what the host knows of it.

    Args:
        device: Which one.
    """

    def __init__(self, device: torch.device) -> None:
        #: int64 `[masters, 2]`: elements that became masters, and that were refused, so far
        self.found = torch.zeros(0, 2, dtype=torch.int64, device=device)
        self.is_new = False  # whether something was counted that was not sent
        self._known: list[list[int]] = []
        self._sent: HostCopy | None = None

    def make_room(self, rows: int) -> None:
        """Adds rows for masters that were made since."""
        if len(self.found) < rows:
            more = self.found.new_zeros(rows - len(self.found), 2)
            self.found = torch.cat([self.found, more])

    def news(self) -> list[list[int]]:
        """Returns what was counted since the last time, as far as the host knows; no host sync."""
        if comes_late(self.found.device):
            now = None if is_capturing(self.found.device) else self._exchange()
        else:
            now = self.found.tolist() if self.is_new else None
            self.is_new = False
        if now is None:
            return []
        before = self._known + [[0, 0]] * (len(now) - len(self._known))
        self._known = now
        return [
            [a - b for a, b in zip(*pair, strict=True)] for pair in zip(now, before, strict=True)
        ]

    def _exchange(self) -> list[list[int]] | None:
        """Returns what was sent last if it has arrived, and sends what is new."""
        arrived = None
        if self._sent is not None and self._sent.has_arrived():
            arrived, self._sent = self._sent.values.tolist(), None
        if self._sent is None and self.is_new:
            self._sent, self.is_new = HostCopy(self.found), False
        return arrived


class WeightEdits:
    """Finds out about weights that are not their rounded masters, and makes them masters.

    Args:
        rule: One of `RULES`.
        masters: Where the masters are.
        backend: Compares and adopts.
        groups: The optimizer's param groups, for names.
    """

    def __init__(
        self,
        rule: str,
        masters: Masters,
        backend: Backend,
        groups: Groups,
    ) -> None:
        self._rule = rule
        self._masters = masters
        self._backend = backend
        self._groups = groups
        self._counts: dict[torch.device, _Counts] = {}
        self._warned: set[Tensor] = set()

    def forget(self) -> None:
        """Forgets what was counted: the masters were replaced."""
        self._counts.clear()
        self._warned.clear()

    def check(self, caller: str) -> None:
        """Raises if masters came without their weights; syncs after a load, and never else.

        If the rule is "raise", also if somebody has changed a weight; syncs if one was written to.

        Args:
            caller: The method that asks, for messages.

        Raises:
            StageError: A weight is not its rounded master. Nothing has changed.
        """
        masters = self._masters
        asked = masters.written() if self._rule == "raise" else masters.never_fitted()
        if asked:
            self._check_fit(asked, caller, "sync_masters_from_model() to go on from the weights")
            masters.note(asked)

    def _check_fit(self, params: Sequence[Tensor], caller: str, remedy: str) -> None:
        stale = self._masters.stale(params)
        if stale:
            raise StageError(
                f"{caller}: expected weights that are their rounded masters, got others in "
                f"{self._few(stale)}: they were written to since the last step, or "
                f"the optimizer's state was loaded without the model's. Call {remedy}, or load "
                "the weights that go with the masters."
            )

    def adopt(self, *, began: bool) -> None:
        """Makes weights that somebody changed the masters; no host sync, but see `check`.

        Args:
            began: Whether a step was taken. Before, ranks have to start from the same masters.

        Raises:
            StageError: A changed element is not finite, now (CPU) or in an earlier step (CUDA); its
                master has stayed. Or before the first step, with several ranks, one was changed.
        """
        self._hear()
        masters = self._masters
        params = [p for p, _ in masters.items()] if self._rule == "always" else masters.written()
        if not params:
            return
        if not began and _several_ranks():
            self._check_fit(
                masters.written(),
                "step()",
                "sync_masters_from_model(exact=True) on every rank, so that all start alike",
            )
        for device in devices_of(params):
            self._adopt_on(device, [param for param in params if param.device == device])
        masters.note(params)
        self._hear()

    def _adopt_on(self, device: torch.device, params: list[Tensor]) -> None:
        masters = self._masters
        counts = self._counts_on(device)
        places = list(map(masters.place_of, params))
        whole = len(places) == len(counts.found) and places == list(range(len(places)))
        found = counts.found if whole else torch.zeros_like(counts.found[: len(places)])
        self._passes_on(device, params).adopt_(
            [param.detach() for param in params], list(map(masters.of, params)), found
        )
        if not whole:
            for place, row in zip(places, found.unbind(), strict=True):
                counts.found[place].add_(row)
        counts.is_new = True

    def _passes_on(self, device: torch.device, params: Sequence[Tensor]) -> Backend:
        """Returns what adopts: plain torch where kernels have no table or other layouts."""
        # of all masters there is one since the first step; of those that were written to, a capture
        # would have to upload one
        new = self._rule != "always" and is_capturing(device)
        if new or any(self._masters.of(param).stride() != param.stride() for param in params):
            return reference
        return self._backend

    def _counts_on(self, device: torch.device) -> _Counts:
        counts = self._counts.setdefault(device, _Counts(device))
        counts.make_room(len(self._masters))
        return counts

    def _hear(self) -> None:
        """Warns of what was adopted and raises over what was refused, once the host knows."""
        if not self._counts:
            return
        params = [param for param, _ in self._masters.items()]
        adopted, refused = dict[Tensor, int](), dict[Tensor, int]()
        for counts in self._counts.values():
            for param, (took, left) in zip(params, counts.news(), strict=False):
                if took and param not in self._warned:
                    adopted[param] = took
                if left:
                    refused[param] = left
        self._masters.suspect(refused)
        if adopted:
            self._warned.update(adopted)
            warnings.warn(
                f"{sum(adopted.values())} elements of {self._few(adopted)} were written to by "
                "others and became their float32 masters, which have only the digits of the "
                "weights now; elements that were not changed keep theirs. This is said once of "
                'each parameter. Pass on_weight_edit="raise" to find out where it happens.',
                stacklevel=6,
            )
        if refused:
            raise StageError(
                f"step(): expected finite numbers where weights were written to, got "
                f"{sum(refused.values())} that are not in {self._few(refused)}: their masters are "
                "as before. Write finite ones, or call sync_masters_from_model() to take them."
            )

    def _few(self, params: Collection[Tensor]) -> str:
        names = ", ".join(name_of(param, self._groups) for param in [*params][:3])
        return f"{names} and {len(params) - 3} more" if len(params) > 3 else names


def _several_ranks() -> bool:
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
