"""Notices float16 gradients that flush to zero because no loss scale lifts them.

What has become 0 nobody can count: dead units and unused rows are 0 as well. What has not yet tells
how far down the gradients reach. Below 2^-22 float16 has three numbers, 2^-24 times 1, 2 and 3; of
gradients that often land there, others have landed below. Handwritten digits (`mpcore.demo`) in
their 8th step, float16 without a scale; shares of what is not 0, and of what a scale would save:

    loss x    below 2^-14    below 2^-22    flushed to 0
    1             2 %            0 %            0 %
    1e-2         54 %            1 %            0 %
    1e-3         98 %            4 %            1 %
    1e-4        100 %           24 %            8 %    warned of
    1e-5        100 %           71 %           36 %    warned of

If every one is 0, they are said to flush only if the loss is seen and is not 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from mpcore.backends import Backend
from mpcore.base import HostCopy, comes_late, devices_of, held_here, is_capturing, why_no_memory

#: Passes before the first look; the next one comes after twice as many. The first steps are unlike
#: the rest: an output layer that begins with zeros makes all other gradients 0 or tiny.
FIRST = 8
#: Which share of the values that are not 0 may be below 2^-22: between the third and the fourth row
#: of the table above. 540 steps of the third reach the accuracy of those with a loss scale.
TOO_MANY = 1 / 8

_NEVER = 2**63
#: How many biased float32 exponents are of 0, below 2^-22, below 2^-14, above, and not finite.
_PARTS = [127 - 24, 2, 8, 127 + 15, 1]


class FlushWatch:
    """Counts float16 gradients of a loss that has no scale, and warns once; no host sync.

    It looks after 8, 16, 32... passes, one more read of the gradients then; other passes cost a
    comparison of two integers. A CPU's answer is there at once, that of a GPU some passes later.
    """

    def __init__(self) -> None:
        self._passes = 0
        self._next = FIRST  # the pass that has something to do
        self._sent: HostCopy | None = None
        self._loss: Tensor | None = None  # of the pass that is looked at, if it was handed to us

    def see_loss(self, outputs: object) -> None:
        """Hears what a backward pass is going to begin with."""
        looks = self._passes + 1 >= self._next and self._sent is None
        if looks and isinstance(outputs, Tensor) and outputs.numel() == 1:
            self._loss = outputs.detach()

    def see(self, params: Sequence[Tensor], backend: Backend, home: torch.device) -> None:
        """Hears of the gradients of a pass, before anybody unscales or drops them.

        Args:
            params: Parameters that have a gradient.
            backend: Counts.
            home: The device that collects numbers.
        """
        self._passes += 1
        if self._passes >= self._next and not is_capturing(home):
            self._act(params, backend, home)

    def _act(self, params: Sequence[Tensor], backend: Backend, home: torch.device) -> None:
        if self._sent is None:
            counts = _counts(params, self._loss, backend, home)
            self._loss = None
            self._next = 1 << self._passes.bit_length()
            if counts is None:
                return
            if not comes_late(home):
                self._judge(counts)
                return
            self._sent = HostCopy(counts)
            self._next = self._passes + 1
        elif self._sent.has_arrived():
            self._next = 1 << self._passes.bit_length()
            self._judge(self._sent.values)
            self._sent = None

    def _judge(self, counts: Tensor) -> None:
        zeros, low, subnormal, normal, bad, largest, loss = counts.tolist()
        some = low + subnormal + normal
        if zeros and not some and not bad and loss and math.isfinite(loss):
            found = (
                f"all {zeros:.0f} values are 0 although the loss is {loss:.2g}. Unless it does not "
                "depend on them, they were below 2^-25, which float16 rounds to 0"
            )
        elif low > TOO_MANY * some:
            found = (
                f"of {some:.0f} values that are not 0, {low / some:.1%} are below 2^-22, where "
                f"float16 has three numbers left, and {(low + subnormal) / some:.1%} are below "
                f"2^-14, where it loses digits; {zeros / (zeros + some):.1%} of all values are 0, "
                f"and the largest is {largest:.2g}"
            )
        else:
            return
        self._next = _NEVER
        warnings.warn(
            f"float16 gradients flush to 0: {found}. The loss has no scale: pass "
            "loss_scale=mpcore.DynamicLossScale() and call optimizer.backward(loss); in a trainer "
            "that calls loss.backward() itself, make an mpcore.GradScaler its scaler. This is said "
            "once.",
            stacklevel=6,
        )


@torch.no_grad()
def _counts(
    params: Sequence[Tensor], loss: Tensor | None, backend: Backend, home: torch.device
) -> Tensor | None:
    """Returns how many values are 0, below 2^-22, below 2^-14, above, and not finite.

    After these five the largest, and the loss: 0 if nobody has seen it. float64, no host sync. None
    if no gradient in memory is in float16; nobody knows what other wrappers' values mean.
    """
    held = [held_here(param.grad) for param in params if param.grad is not None]
    grads = [g for g in held if g.dtype == torch.float16 and why_no_memory(g) is None]
    rows, peaks = [], []
    for device in devices_of(grads):
        here = [grad for grad in grads if grad.device == device]
        one = torch.ones((), dtype=torch.float32, device=device)
        found = backend.inspect(here, one, None, statistics=True)
        if found.histogram is not None and found.largest is not None:  # they were asked for
            parts = torch.split(found.histogram.sum(0), _PARTS)
            row = torch.stack([part.sum() for part in parts]).double()
            rows.append(row.to(home, non_blocking=True))
            peaks.append(found.largest.amax().double().to(home, non_blocking=True))
    if not rows:
        return None
    seen = torch.zeros((), device=home) if loss is None else loss.to(home, non_blocking=True)
    ends = [torch.stack(peaks).amax(), seen.double().reshape(())]
    return torch.cat([torch.stack(rows).sum(0), torch.stack(ends)])
