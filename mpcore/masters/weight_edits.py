"""Weights that somebody else wrote to: what `step` makes of them.

    an element that is its rounded master     the master keeps its digits
    another one                               becomes the master
    another one that is not finite            does not: an error

Whether a tensor was written to, its version counter tells the host; the rest is found on the
device. What was found is counted there and reaches the host late, as a loss scale's counters do.

On the fused path the update reads every weight itself, if it has to look at all of them, and adopts
before it updates. All else is adopted before the step.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from mpcore.backends import Backend, reference
from mpcore.base import (
    SIXTEEN_BIT,
    HostCopy,
    any_dtensor,
    are_same,
    comes_late,
    devices_of,
    held_here,
    is_capturing,
)
from mpcore.errors import ArgumentError, StageError
from mpcore.masters.masters import Groups, Masters
from mpcore.masters.parameters import name_of
from mpcore.masters.weights import adopt_whole, round_ties, stale_weights
from mpcore.ranks import several_ranks

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
        params: Whose weights are looked at there.
    """

    def __init__(self, device: torch.device, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        #: int64 `[params, 2]`: elements that became masters, and that were refused, so far
        self.found = torch.zeros(len(params), 2, dtype=torch.int64, device=device)
        self.is_new = False  # whether something was counted that was not sent
        self.is_captured = False  # whether a CUDA graph counts here
        self._known: list[list[int]] = []
        self._sent: HostCopy | None = None

    @property
    def is_over(self) -> bool:
        """Whether all is known, and no more will be counted unless a step asks for it."""
        return not self.is_new and self._sent is None and not self.is_captured

    def make_room(self, params: Sequence[Tensor]) -> None:
        """Adds rows for masters that were made since; these are all of them now."""
        if len(self.found) < len(params):
            more = self.found.new_zeros(len(params) - len(self.found), 2)
            self.found = torch.cat([self.found, more])
        self.params = list(params)

    def news(self) -> Iterator[tuple[Tensor, int, int]]:
        """Yields what was counted since the last time, as far as the host knows; no host sync.

        That is a parameter, and how many of its elements became masters and were refused.
        """
        if comes_late(self.found.device):
            now = None if is_capturing(self.found.device) else self._exchange()
        else:
            now = self.found.tolist() if self.is_new else None
            self.is_new = False
        if now is None:
            return
        before = self._known + [[0, 0]] * (len(now) - len(self._known))
        self._known = now
        rows = zip(self.params, now, before, strict=False)
        yield from ((param, *(a - b for a, b in zip(*row, strict=True))) for param, *row in rows)

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
        saturated: 0-d int64, counts weights clamped to the finite maximum.
    """

    def __init__(
        self, rule: str, masters: Masters, backend: Backend, groups: Groups, saturated: Tensor
    ) -> None:
        self._saturated = saturated
        self._rule = rule
        self._masters = masters
        self._backend = backend
        self._groups = groups
        self._counts: dict[torch.device, _Counts] = {}  # of passes over all masters, or some
        self._of_updates: list[_Counts] = []
        self._warned: set[Tensor] = set()
        self._just_loaded: list[Tensor] = []  # maybe by a run that rounds ties otherwise

    def forget(self) -> None:
        """Forgets what was counted: the masters were replaced."""
        self._counts.clear()
        self._of_updates.clear()
        self._warned.clear()
        self._just_loaded.clear()

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
            self._just_loaded += asked

    def _check_fit(self, params: Sequence[Tensor], caller: str, remedy: str) -> None:
        stale = stale_weights(self._masters, params)
        if stale:
            raise StageError(
                f"{caller}: expected weights that are their rounded masters, got others in "
                f"{self._few(stale)}: they were written to since the last step, or "
                f"the optimizer's state was loaded without the model's. Call {remedy}, or load "
                "the weights that go with the masters."
            )

    def adopt(self, *, began: bool, later: Sequence[Tensor] = ()) -> None:
        """Makes weights that somebody changed the masters; no host sync, but see `check`.

        Packed masters need no adopting: their weights are a part of them. Those that are whole,
        since they came in float32, are packed then.

        Args:
            began: Whether a step was taken. Before, ranks have to start from the same masters.
            later: Parameters that `begin_update` is going to be asked about, if it looks at any.

        Raises:
            StageError: A changed element is not finite, now (CPU) or in an earlier step (CUDA); its
                master has stayed. Or before the first step, with several ranks, one was changed.
        """
        self._adopt(began=began, later=later)
        self._masters.pack(self._saturated)

    def _adopt(self, *, began: bool, later: Sequence[Tensor]) -> None:
        masters = self._masters
        if self._counts or self._of_updates:
            self.hear()
        if self._just_loaded and self._looks_at_all:
            for param in self._just_loaded:
                round_ties(param, masters.of(param))
            masters.note(self._just_loaded)
        self._just_loaded.clear()
        if self._rule == "adopt" and (edited := masters.edited()):
            self._round(edited)
        # of a DTensor each rank adopts what it holds, and all of it
        if not began and several_ranks():
            written = [p for p in masters.written() if not any_dtensor([p])]
            remedy = "sync_masters_from_model(exact=True) on every rank, so that all start alike"
            if written:
                self._check_fit(written, "step()", remedy)
        params = self._to_look_at(later)
        if not params:
            return
        for device in devices_of(params):
            self._adopt_on(device, [param for param in params if param.device == device])
        masters.note(params)
        self.hear()

    @property
    def _looks_at_all(self) -> bool:
        """Whether a step compares every weight with its master.

        It does if one is a DTensor: what others write to the tensor that it holds, as
        `torch.distributed.checkpoint` does when it loads, nobody counts.
        """
        if self._masters.held.store != "float32":
            return False
        return self._rule == "always" or (self._rule == "adopt" and self._masters.any_sharded)

    def _round(self, params: Sequence[Tensor]) -> None:
        """Makes weights their rounded masters: those are what somebody wrote to."""
        for device in devices_of(params):
            here = [param for param in params if param.device == device]
            nothing = torch.zeros((), dtype=torch.int32, device=device)
            pairs = list(map(self._masters.of, here)), [param.detach() for param in here]
            self._backend.cast_into(*pairs, nothing, nothing.long())
        self._masters.note(params)

    def _to_look_at(self, later: Sequence[Tensor]) -> list[Tensor]:
        """Returns the parameters whose weights are compared with their masters before the step."""
        if self._masters.held.store != "float32":
            return self._whole_to_look_at()
        if not self._looks_at_all:
            return self._masters.written()
        in_update = set(map(id, later))
        return [param for param, _ in self._masters.items() if id(param) not in in_update]

    def _whole_to_look_at(self) -> list[Tensor]:
        """Returns the parameters whose masters are going to be packed and may have to adopt."""
        masters = self._masters
        if self._rule == "always" or masters.any_sharded:
            return [param for param, _ in masters.items() if masters.held.is_whole(param)]
        return masters.written()

    def begin_update(self, batches: Sequence[Sequence[Tensor]]) -> Tensor | None:
        """Returns where an update counts what it adopts; None if it looks at no weight.

        Args:
            batches: The parameters that it updates, all on one device; a batch has one dtype.
        """
        if not self._looks_at_all:
            return None
        weights = [p for batch in batches if batch[0].dtype in SIXTEEN_BIT for p in batch]
        if not weights:
            return None
        known = (c for c in self._of_updates if are_same(c.params, weights))
        counts = next(known, None)
        if counts is None:
            self._of_updates = [c for c in self._of_updates if not c.is_over]
            counts = _Counts(weights[0].device, weights)
            self._of_updates.append(counts)
        counts.is_new = True
        counts.is_captured = counts.is_captured or is_capturing(counts.found.device)
        return counts.found

    def _adopt_on(self, device: torch.device, params: list[Tensor]) -> None:
        masters = self._masters
        counts = self._counts_on(device)
        places = list(map(masters.place_of, params))
        whole = len(places) == len(counts.found) and places == list(range(len(places)))
        found = counts.found if whole else torch.zeros_like(counts.found[: len(places)])
        here = [held_here(param.detach()) for param in params]
        held = [held_here(masters.of(param)) for param in params]
        if masters.held.store == "float32":
            self._passes_on(device, here, held).adopt_(here, held, found)
        else:
            for param, row in zip(params, found.unbind(), strict=True):
                adopt_whole(param, masters.of(param), row)
        if not whole:
            for place, row in zip(places, found.unbind(), strict=True):
                counts.found[place].add_(row)
        counts.is_new = True

    def _passes_on(
        self, device: torch.device, here: Sequence[Tensor], held: Sequence[Tensor]
    ) -> Backend:
        """Returns what adopts: plain torch where kernels have no table or other layouts."""
        # of all masters there is one since the first step; of those that were written to, a capture
        # would have to upload one
        new = not self._looks_at_all and is_capturing(device)
        if new or any(w.stride() != m.stride() for w, m in zip(here, held, strict=True)):
            return reference
        return self._backend

    def _counts_on(self, device: torch.device) -> _Counts:
        counts = self._counts.setdefault(device, _Counts(device, []))
        counts.make_room([param for param, _ in self._masters.items()])
        return counts

    def hear(self) -> None:
        """Warns of what was adopted and raises over what was refused, once the host knows.

        Raises:
            StageError: An element was refused. Everything is whole.
        """
        if not (self._counts or self._of_updates):
            return
        adopted, refused = Counter[Tensor](), Counter[Tensor]()
        for counts in (*self._counts.values(), *self._of_updates):
            for param, took, kept_out in counts.news():
                if took and param not in self._warned:
                    adopted[param] += took
                if kept_out:
                    refused[param] += kept_out
        # of an error it may be asked what the weights are now: a step that was taken overwrote them
        left = stale_weights(self._masters, refused) if refused else []
        self._masters.suspect(left)
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
            remedy = (
                "their masters are as before. Write finite ones, or call sync_masters_from_model() "
                "to take them."
                if left
                else "the step was taken from their masters and has overwritten them. Go on, or "
                "write them again and call sync_masters_from_model() to take them."
            )
            raise StageError(
                f"step(): expected finite numbers where weights were written to, got "
                f"{sum(refused.values())} that are not in {self._few(refused)}: {remedy}"
            )

    def _few(self, params: Collection[Tensor]) -> str:
        names = ", ".join(name_of(param, self._groups) for param in [*params][:3])
        return f"{names} and {len(params) - 3} more" if len(params) > 3 else names
