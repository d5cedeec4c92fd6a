"""What happens in the steps of a golden run, as data that engine and oracle both follow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpcore_testing.golden.values import numbers


@dataclass(frozen=True)
class Pass:
    """One backward pass.

    Attributes:
        short: Whether its gradients have few bits, so that their norm is exact.
        bad: What one value of one gradient is instead, or None.
        missing: The parameter that gets no gradient, or None.
        factor: What all gradients are multiplied by, a power of two.
    """

    short: bool = False
    bad: float | None = None
    missing: int | None = None
    factor: float = 1.0

    def gradients(self, params: list[nn.Parameter], *key: int) -> list[Tensor | None]:
        """Returns unscaled float32 gradients; `key` says the step and the pass."""
        grads: list[Tensor | None] = []
        for i, param in enumerate(params):
            grad = numbers(param.shape, 2, *key, i, short=self.short) * self.factor
            if self.bad is not None and i == sum(key) % len(params):
                grad.view(-1)[grad.numel() // 2] = self.bad
            grads.append(None if i == self.missing else grad)
        return grads


@dataclass(frozen=True)
class Step:
    """One step: its passes, added up by `accumulate()` if there are several, and a limit."""

    passes: tuple[Pass, ...] = (Pass(),)
    clip: float | None = None


INF, NAN = math.inf, math.nan
CLEAN = Step()
CLIPPED = Step((Pass(short=True),), clip=0.75)
#: Overflows from the first step on, clips that shrink and one that does not, sums, a gap.
EVERYTHING = (
    Step((Pass(bad=INF),)),
    CLEAN,
    CLIPPED,
    Step((Pass(), Pass(), Pass(missing=2))),
    CLEAN,
    Step((Pass(), Pass(bad=NAN), Pass())),
    Step((Pass(short=True, missing=1),), clip=1e6),
    CLIPPED,
)
#: The norms of these are rounded.
ROUNDED_NORMS = tuple(Step((Pass(),), clip=limit) for limit in (0.7, 0.3, 1e6, 0.1))
#: Overflows alone, in a row, and one step apart.
SKIPS = tuple(Step((Pass(bad=-INF),)) if n in (0, 1, 3, 5, 6) else CLEAN for n in range(9))
#: Gradients that become smaller and larger again, and overflow.
SWELLING = tuple(
    Step((Pass(factor=2.0**e, bad=INF if n == 3 else None),))
    for n, e in enumerate((-3, -6, -6, -6, -9, -2, 0, 1))
)


def linear_loss(params: list[nn.Parameter], grads: list[Tensor | None]) -> Tensor:
    """Returns a loss whose gradients are `grads`, rounded to the dtypes of `params`."""
    pairs = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]
    return torch.stack([(param.float() * grad).sum() for param, grad in pairs]).sum()
