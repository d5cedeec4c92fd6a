"""The one collective of a step: what every rank found, added up in integers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from mpcore.base import HostCopy, comes_late, is_capturing
from mpcore.errors import StageError
from mpcore.loss_scale import LossScaleTensors
from mpcore.ranks.collective import reduced
from mpcore.ranks.exact_sum import DIGITS, from_digits, to_digits
from mpcore.ranks.ranks import Ranks
from mpcore.ranks.shares import Shares

#: What ranks must have in common: by name, as a difference is reported.
_COMMON = ("exponent of the loss scale", "growth tracker", "steps")
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
        self._group = distributed.group.WORLD if ranks.group is None else ranks.group
        self._size = distributed.get_world_size(self._group)
        self._state = state
        self._shares = Shares(ranks, self._group)
        self._begun = False
        self._mask: tuple[Sequence[Tensor], Tensor] | None = None  # of some parameters
        self._sent: deque[HostCopy] = deque()

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
            self._begun, self._mask = True, None

    def start_anew(self) -> None:
        """Notes that masters were replaced: copies are compared again."""
        self._begun = False

    def counted(self, params: Sequence[Tensor], device: torch.device) -> Tensor:
        """Returns 1 for each parameter that this rank counts, 0 for others; float64 on `device`."""
        if self._mask is None or self._mask[0] is not params or self._mask[1].device != device:
            counts = [float(self._shares.counts(param)) for param in params]
            self._mask = params, torch.tensor(counts, dtype=torch.float64, device=device)
        return self._mask[1]

    def agree(
        self, found_inf: Tensor, square_sum: Tensor, *, has_gradients: bool, scaled: bool
    ) -> Agreed:
        """Returns what all ranks have found; waits for them, not for the host.

        Args:
            found_inf: 0-d, non-zero: this rank's overflow.
            square_sum: 0-d float64: of the elements that this rank counts.
            has_gradients: Whether this rank has any.
            scaled: Whether it has scaled a loss, or needs not.

        Raises:
            StageError: On every rank, of a CPU at once, elsewhere some steps later: loss scales or
                counters differ, or no rank has scaled a loss.
        """
        home = square_sum.device
        own = self._common().to(home)
        host = torch.tensor([has_gradients, scaled]).to(home, non_blocking=True).long()
        flags = torch.cat([(found_inf != 0).long().reshape(1), host])
        total = self._add_up(torch.cat([flags, to_digits(square_sum), own, own * own]), self._group)
        flags, digits, sums, squares = torch.split_with_sizes(
            total, [len(flags), DIGITS, len(own), len(own)]
        )
        apart = squares * self._size != sums * sums
        forgotten = (flags[1] != 0) & (flags[2] == 0)
        self._check(torch.cat([own, sums, apart.long(), forgotten.long().reshape(1)]))
        return Agreed(flags[0] != 0, flags[1] != 0, from_digits(digits))

    def largest_of_ranks(self, largest: Tensor) -> Tensor:
        """Returns the largest of a 0-d float64 of each rank; a collective of its own."""
        return reduced(largest, self._group, distributed.ReduceOp.MAX)

    @torch.no_grad()
    def average_(self, sums: dict[Tensor, Tensor], params: Sequence[Tensor]) -> None:
        """Makes sums of gradients the mean of those that ranks with copies have; collective.

        A mean that a synchronised backward pass has left is its own mean. Syncs with the host,
        which has to know of which parameters any rank has a sum.

        Args:
            sums: By parameter; one that only other ranks have is added.
            params: All of the optimizer.
        """
        shared = [param for param in params if self._shares.group_of(param) is not None]
        for group in dict.fromkeys(map(self._shares.group_of, shared)):
            here = [param for param in shared if self._shares.group_of(param) is group]
            there = torch.tensor([param in sums for param in here]).long().to(here[0].device)
            for param, ranks in zip(here, self._add_up(there, group).tolist(), strict=True):
                if ranks:
                    dtype = torch.promote_types(param.dtype, torch.float32)
                    total = sums.get(param, torch.zeros_like(param, dtype=dtype))
                    total = self._add_up(total.detach(), group)
                    sums[param] = total.div_(distributed.get_world_size(group))

    def _common(self) -> Tensor:
        exponent = torch.frexp(self._state.scale)[1].long()
        counters = (self._state.growth_tracker, self._state.count("steps"))
        return torch.stack([exponent, *(number.long() & (2**_BITS - 1) for number in counters)])

    @staticmethod
    def _add_up(numbers: Tensor, group: Any) -> Tensor:
        return reduced(numbers, group, distributed.ReduceOp.SUM)

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
                f"step(): expected {self._size} ranks with one loss scale, got some that differ: "
                f"{'; '.join(lines)}. Weights may differ as well. Load one checkpoint on all "
                "ranks. If they train different models, give ranks= the group of each."
            )
        if forgotten:
            raise StageError(
                "step(): expected gradients of a scaled loss, got no scale() on any rank since the "
                "last step. Clear the gradients and call optimizer.backward(loss) instead of "
                "loss.backward() on the ranks that have the loss."
            )
