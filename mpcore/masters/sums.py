"""What several backward passes have left for a step: sums, and which of them overflowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Overflow(NamedTuple):
    """A backward pass whose gradients were not finite.

    Attributes:
        micro_batch: Which one of the step, from 0, in the order in which gradients were added up.
        loss: Its name; "" is the optimizer's own.
        parameters: The names of the parameters whose gradient was not finite.
    """

    micro_batch: int
    loss: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class MicroBatch:
    """What one or several backward passes with one scale have added.

    Attributes:
        loss: The name of the loss.
        found_inf: 0-d bool: whether a gradient was not finite.
        largest: 0-d float64, the largest magnitude of its float16 gradients; None: nobody looked.
        flags: By parameter 0-d int32, not 0 if its gradient was not finite.
    """

    loss: str
    found_inf: Tensor
    largest: Tensor | None
    flags: dict[Tensor, Tensor]


class Accumulated(NamedTuple):
    """What the backward passes of a step have left so far.

    Attributes:
        sums: By parameter, float32 (float64 for float64 parameters).
        micro_batches: In order.
    """

    sums: dict[Tensor, Tensor]
    micro_batches: list[MicroBatch]

    def losses(self) -> list[str]:
        """Returns the names of the losses that took part."""
        return list(dict.fromkeys(micro_batch.loss for micro_batch in self.micro_batches))

    def outcome(self, loss: str) -> tuple[Tensor, Tensor | None]:
        """Returns found_inf of one loss, 0-d int32, and its largest gradient if it was looked for.

        Both are where the masters' decisions are made: on the device of its first gradient.
        """
        own = [micro_batch for micro_batch in self.micro_batches if micro_batch.loss == loss]
        found = torch.stack([micro_batch.found_inf for micro_batch in own]).any().int()
        seen = [micro_batch.largest for micro_batch in own if micro_batch.largest is not None]
        return found, torch.stack(seen).amax() if seen else None

    def overflows(self, name_of: Callable[[Tensor], str]) -> list[Overflow]:
        """Returns which micro-batches were not finite, and where; syncs with the host."""
        found = []
        for number, micro_batch in enumerate(self.micro_batches):
            names = tuple(name_of(param) for param, flag in micro_batch.flags.items() if int(flag))
            if names:
                found.append(Overflow(number, micro_batch.loss, names))
        return found

    def flags(self) -> dict[Tensor, Tensor]:
        """Returns for each parameter whether any of its gradients was not finite, 0-d int32."""
        found: dict[Tensor, Tensor] = {}
        for micro_batch in self.micro_batches:
            for param, flag in micro_batch.flags.items():
                found[param] = found[param] | flag if param in found else flag
        return found
