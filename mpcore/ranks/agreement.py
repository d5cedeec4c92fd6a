"""The one collective of a step: what every rank found, added up in integers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from mpcore.base import HostCopy, are_same, comes_late, is_capturing
from mpcore.errors import StageError
from mpcore.loss_scale import LossScaleTensors
from mpcore.ranks.buckets import flat_sums, in_buckets, in_pieces
from mpcore.ranks.collective import gathered, naming_failures, reduced
from mpcore.ranks.exact_sum import DIGITS, from_digits, to_digits
from mpcore.ranks.ranks import Ranks
from mpcore.ranks.shares import Shares

#: What ranks must have in common: by name, as a difference is reported.
_COMMON = ("exponent of the loss scale", "growth tracker", "steps", "gradients of copies")
# counters are compared by this many of their last bits, so that squares of them can be added
_BITS = 20
# steps after which a device's answer is looked at: the host may run so far ahead
_LATE = 8


class Agreed(NamedTuple):
    """What ranks have found together; on the device of the loss scale.

    Attributes:
        found_inf: 0-d bool: whether a gradient of any rank was not finite.
        any_gradient: 0-d bool: whether any rank has one.
        square_sum: 0-d float64: of all gradients, each element once. The same bits on every rank.
    """

    found_inf: Tensor
    any_gradient: Tensor
    square_sum: Tensor


class Agreement:
    """Adds up what ranks have found, and notices that they are not where each other are.

    Args:
        ranks: Who they are.
        state: This rank's loss scale.
    """

    def __init__(self, ranks: Ranks, state: LossScaleTensors) -> None:
        # None is all ranks: whoever held their group past its end would abort the process
        self._group = ranks.group
        self._size = distributed.get_world_size(self._group)
        self._state = state
        self._shares = Shares(ranks, self._group)
        self._begun = False
        #: by device: parameters, and which of them count
        self._masks: dict[torch.device, tuple[Sequence[Tensor], Tensor | None]] = {}
        self._copies: tuple[Sequence[Tensor], int] | None = None  # of some parameters
        self._sent: deque[HostCopy] = deque()
        #: the ranks that have batches left, where some may have none; None: all have
        self._present: list[int] | None = None
        self.asked = 0  # how often ranks agreed since it was last found who is present

    def find_present(self, here: bool) -> None:
        """Finds out which ranks still have batches, within a `Join`; collective, syncs.

        Args:
            here: Whether this one has.
        """
        purpose = partial(self._purpose, "which ranks have batches left")
        found = gathered([here], self._group, purpose=purpose)
        self._present = [rank for rank, (there,) in enumerate(found) if there]
        self._masks.clear()
        self.asked = 0

    def end_join(self) -> None:
        """Notes that all ranks have batches again, or none."""
        self._present = None
        self._masks.clear()

    def begin(
        self,
        params: Sequence[Tensor],
        name_of: Callable[[Tensor], str],
        value_of: Callable[[Tensor], Tensor],
    ) -> None:
        """Compares copies before the first step, and if parameters are others: collective then.

        Args:
            params: All of the optimizer.
            name_of: Their names.
            value_of: Their masters.

        Raises:
            StageError: On every rank, if copies differ.
        """
        if not (self._begun and self._shares.know(params)):
            self._shares.compare(params, name_of, value_of)
            self._begun = True
            self._masks.clear()
            self._copies = None

    def start_anew(self) -> None:
        """Notes that masters were replaced: copies are compared again."""
        self._begun = False

    def counted(self, params: Sequence[Tensor], device: torch.device) -> Tensor:
        """Returns 1 for each parameter that this rank counts, 0 for others; float64 on `device`."""
        known, mask = self._masks.get(device, ([], None))
        if mask is None or not are_same(known, params):
            counts = [float(self.counts(param)) for param in params]
            mask = torch.tensor(counts, dtype=torch.float64, device=device)
            self._masks[device] = params, mask
        return mask

    def counts(self, param: Tensor) -> bool:
        """Whether this rank counts a parameter: of copies the first that has batches left does."""
        if self._present and self._shares.are_copies(param):
            return distributed.get_rank(self._group) == self._present[0]
        return self._shares.counts(param)

    def copies(self, params: Sequence[Tensor]) -> int:
        """Returns how many of these parameters all ranks hold."""
        if self._copies is None or not are_same(self._copies[0], params):
            held = [param for param in params if self._shares.are_copies(param)]
            count = sum(self._shares.group_of(param) is self._group for param in held)
            self._copies = params, count
        return self._copies[1]

    def agree(
        self, found_inf: Tensor, square_sum: Tensor, *, params: Sequence[Tensor], scaled: bool
    ) -> Agreed:
        """Returns what all ranks have found; waits for them, not for the host.

        Args:
            found_inf: 0-d, non-zero: this rank's overflow.
            square_sum: 0-d float64: of the elements that this rank counts.
            params: Those of which this rank has gradients.
            scaled: Whether it has scaled a loss, or needs not.

        Raises:
            StageError: On every rank, of a CPU at once, elsewhere some steps later: loss scales or
                counters differ, or no rank has scaled a loss.
        """
        self.asked += 1
        home = square_sum.device
        own = self._common(self.copies(params)).to(home)
        # filling happens on the device; torch.tensor would copy from the host
        known = [torch.full((), int(n), device=home) for n in (bool(params), scaled)]
        flags = torch.stack([(found_inf != 0).long().reshape(()), *known])
        numbers = torch.cat([flags, to_digits(square_sum), own, own * own])
        total = self._add_up(numbers, self._group, "what ranks found in their gradients")
        flags, digits, sums, squares = torch.split_with_sizes(
            total, [len(flags), DIGITS, len(own), len(own)]
        )
        apart = squares * self._sizes(home) != sums * sums
        forgotten = (flags[1] != 0) & (flags[2] == 0)
        self._check(torch.cat([own, sums, apart.long(), forgotten.long().reshape(1)]))
        return Agreed(flags[0] != 0, flags[1] != 0, from_digits(digits))

    def _sizes(self, home: torch.device) -> int | Tensor:
        """Returns how many ranks have said each of `_COMMON`: who has no batches has no copies."""
        if self._present is None:
            return self._size
        sizes = [self._size] * (len(_COMMON) - 1)
        return torch.tensor([*sizes, len(self._present)], device=home)

    def all(self, here: bool) -> bool:
        """Returns whether something is so on all ranks; a collective of its own, which syncs."""
        purpose = partial(self._purpose, "whether every rank steps")
        return all(there for (there,) in gathered([here], self._group, purpose=purpose))

    def exchange(self, value: Any, what: str, left: str) -> list[Any]:
        """Returns a value of each rank, in order, after a step; a collective of its own, syncs.

        Args:
            value: Of this rank, to be pickled.
            what: It is, for the message of an error.
            left: How all is when it fails, likewise.

        Raises:
            RankError: The collective failed.
        """
        found: list[Any] = [None] * self._size
        steps = self._state.count("steps")
        with naming_failures(self._group, lambda: f"after step {int(steps)}, {what}", left):
            distributed.all_gather_object(found, value, self._group)
        return found

    def largest_of_ranks(self, largest: Tensor) -> Tensor:
        """Returns the largest of a 0-d float64 of each rank; a collective of its own."""
        purpose = partial(self._purpose, "the largest gradient of all ranks")
        return reduced(largest, self._group, distributed.ReduceOp.MAX, purpose=purpose)

    @torch.no_grad()
    def average_(self, sums: dict[Tensor, Tensor], params: Sequence[Tensor]) -> None:
        """Makes sums of gradients the mean of those that ranks with copies have; collective.

        A mean that a synchronised backward pass has left is its own mean. Syncs with the host,
        which has to know of which parameters any rank has a sum.

        Args:
            sums: By parameter; one that only other ranks have is added.
            params: All of the optimizer.
        """
        shared = [param for param in params if self._shares.are_copies(param)]
        means: dict[Tensor, Tensor] = {}
        for group in dict.fromkeys(map(self._shares.group_of, shared)):
            here = [param for param in shared if self._shares.group_of(param) is group]
            there = torch.tensor([param in sums for param in here]).long().to(here[0].device)
            ranks = self._add_up(there, group, "which sums of gradients ranks have").tolist()
            some = [param for param, count in zip(here, ranks, strict=True) if count]
            for bucket in in_buckets(some):
                own = flat_sums(bucket, sums)
                total = self._add_up(own, group, "sums of gradients")
                means.update(in_pieces(bucket, total.div_(distributed.get_world_size(group))))
        sums.update(means)  # last: a collective may fail

    def _common(self, copies: int) -> Tensor:
        exponent = torch.frexp(self._state.scale)[1].long()
        counters = (self._state.growth_tracker, self._state.count("steps"))
        last = [number.long() & (2**_BITS - 1) for number in counters]
        return torch.stack([exponent, *last, torch.full_like(exponent, copies)])

    def _add_up(self, numbers: Tensor, group: Any, what: str) -> Tensor:
        purpose = partial(self._purpose, what)
        return reduced(numbers, group, distributed.ReduceOp.SUM, purpose=purpose)

    def _purpose(self, what: str) -> str:
        """Says what a collective was about; syncs with the host."""
        return f"step {int(self._state.count('steps')) + 1}, {what}"

    def _check(self, found: Tensor) -> None:
        """Raises if ranks were apart in this step, or in one that the host has heard of since."""
        if not comes_late(found.device):
            self._raise_if_apart(found)
        elif not is_capturing(found.device):
            self._sent.append(HostCopy(found))
            if len(self._sent) > _LATE:
                sent = self._sent.popleft()
                sent.wait()  # it has long arrived, and all ranks look at the same step's
                self._raise_if_apart(sent.values)

    def _raise_if_apart(self, found: Tensor) -> None:
        *numbers, forgotten = found.tolist()
        count = len(_COMMON)
        own, sums, apart = numbers[:count], numbers[count : 2 * count], numbers[2 * count :]
        lines = [
            f"{name} {mine} here, {total / self._size:g} on average"
            for name, mine, total, differs in zip(_COMMON, own, sums, apart, strict=True)
            if differs
        ]
        if lines:
            raise StageError(
                f"step(): expected {self._size} ranks that go the same way, got some that differ: "
                f"{'; '.join(lines)}. Weights may differ as well. Load one checkpoint on all "
                "ranks. If they train different models, give ranks= the group of each."
            )
        if forgotten:
            raise StageError(
                "step(): expected gradients of a scaled loss, got no scale() on any rank since the "
                "last step. Clear the gradients and call optimizer.backward(loss) instead of "
                "loss.backward() on the ranks that have the loss."
            )
