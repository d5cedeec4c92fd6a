"""The gradients of one step once somebody has looked at them, in the model of the sequences."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from mpcore_testing.sequences.numbers import Near

Grad = Callable[[int], "Near | None"]


@dataclass
class Look:
    """What `unscale_`, a clip or a step has collected.

    Attributes:
        members: Parameters that had a gradient and still have.
        factor: What gradients in memory still have to be multiplied by, a power of two.
        clipped: And by this.
        held: The float32 gradients of 16-bit parameters, once there are some; None: dropped.
        applied: Whether they are what is stepped with.
        shown: Whether they are in `p.grad`.
        summed: Whether they are sums of several passes.
        found: Whether something not finite was seen, whatever became of it.
        seen: Whether somebody looked at all.
        largest: Of float16 gradients, unscaled, as they were first seen.
        noted: The members at the last look.
        narrow: Those whose shown gradient somebody replaced by one in 16 bits, not yet taken over.
    """

    members: list[int]
    factor: float = 1.0
    clipped: Near | None = None
    held: dict[int, Near | None] = field(default_factory=dict)
    applied: bool = False
    shown: bool = False
    summed: bool = False
    found: bool = False
    seen: bool = False
    largest: float | None = None
    noted: list[int] = field(default_factory=list)
    narrow: set[int] = field(default_factory=set)

    @classmethod
    def of_sums(
        cls, sums: dict[int, Near], halves: Collection[int], found: set[int], largest: float
    ) -> Look:
        held: dict[int, Near | None] = {i: total for i, total in sums.items() if i in halves}
        look = cls(sorted(sums), held=held, applied=True, summed=True, seen=True)
        look.found, look.largest = bool(found), largest
        return look

    def newcomers(self, having: Collection[int], halves: Collection[int]) -> list[int]:
        """Parameters with a gradient that was not there; of sums no 16-bit one has any."""
        hidden = self.summed and not self.shown
        return [i for i in having if i not in self.members or (hidden and i in halves)]

    def keep(self, grad: Grad, halves: Collection[int]) -> None:
        """Leaves out whose gradient was dropped; takes over what was put into `p.grad`."""
        hidden = halves if self.summed and not self.shown else ()
        self.members = [i for i in self.members if i in hidden or grad(i) is not None]
        self.narrow = set()

    def multiplied(self, grad: Near) -> Near:
        grad = grad.times_power_of_two(self.factor)
        return grad if self.clipped is None else grad * self.clipped

    def clip(self, by: Near) -> None:
        if by.value != 1 or not by.exact:
            self.clipped = by if self.clipped is None else self.clipped * by

    def spend(self) -> None:
        """They are multiplied."""
        self.factor, self.clipped, self.applied = 1.0, None, True

    def show(self) -> None:
        self.shown = True
        self.note()

    def note(self) -> None:
        self.noted = list(self.members)

    def is_dropped(self, grad: Grad) -> bool:
        """Whether somebody else has thrown all of them away."""
        if self.shown:
            return bool(self.noted) and all(grad(i) is None for i in self.noted)
        return not self.summed and all(grad(i) is None for i in self.members)
