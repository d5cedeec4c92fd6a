"""The model of the sequences between the passes and the step: unscale, clip, edits."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpcore_testing.sequences.look import Look
from mpcore_testing.sequences.numbers import Near, rounded, same
from mpcore_testing.sequences.passes import Passes
from mpcore_testing.sequences.state import EVERY, HALVES, PARAMETERS, Refused


class Clips(Passes):
    """What has been looked at, and what is stepped with."""

    def collect(self) -> Look:
        """What every call between the passes and the step begins with."""
        self.leave_failed()
        having = self.having()
        if self.look is not None:
            if self.look.newcomers(having, HALVES):
                raise Refused("a gradient that was not there before")
            self._check_loaded()
            self.look.keep(self.grad, HALVES)
            return self.look
        self._check_loaded()
        if self.sums is not None:
            self._add_up()
            self.look = Look.of_sums(self.sums, HALVES, self.sums_found, self.sums_largest)
            for i, total in self.sums.items():
                if i not in HALVES:
                    self.set_grad(i, total)
            self._forget_sums()
        else:
            if having:
                self._check_scaled()
            self.look = Look(having, factor=1 / self.scale.now)
        self.made |= set(HALVES)
        return self.look

    def _check_loaded(self) -> None:
        if any(self.differs(i).any() for i in self.never_fitted):
            raise Refused("masters were loaded, and other weights")
        self.never_fitted = set()

    def differs(self, i: int) -> Any:
        """Where a weight is not its rounded master."""
        dtype = PARAMETERS[i][0]
        return ~same(self.weights[i], rounded(self.masters[i].value, dtype, saturates=True))

    def stored(self, look: Look, i: int) -> Near:
        """The gradient that is looked at, as it is in memory."""
        grad = look.held[i] if look.applied and i in look.held else self.own[i]
        assert grad is not None
        return grad

    def final(self, look: Look, i: int) -> Near:
        """The gradient that is stepped with."""
        return look.multiplied(self.stored(look, i))

    def look_at(self, look: Look) -> None:
        """Notes an overflow, and once what is the largest float16 gradient."""
        grads = {i: self.stored(look, i) for i in look.members}
        look.found = look.found or not all(grad.finite for grad in grads.values())
        if look.largest is None:
            halves = [g.value for i, g in grads.items() if PARAMETERS[i][0] == "float16"]
            peaks = [float(np.abs(value).max()) * look.factor for value in halves]
            look.largest = max(peaks, default=0.0)
        look.seen = True

    def apply(self, look: Look) -> None:
        """Multiplies: 16-bit gradients into float32 ones, others in place."""
        for i in look.members:
            if i in HALVES:
                look.held[i] = self.final(look, i)
            else:
                self.own[i] = self.final(look, i)
        look.spend()

    def unscale_(self) -> None:
        if self.look is not None and self.look.shown:
            raise Refused("the second unscale_() of a step")
        look = self.collect()
        self.look_at(look)
        self.apply(look)
        look.show()

    def grads(self) -> list[Near]:
        if self.look is None or not self.look.shown:
            raise Refused("nothing was unscaled")
        look = self.collect()
        return [self.stored(look, i) for i in look.members]

    def clip(self, max_norm: float) -> Near:
        """The wrapper's own; returns the norm before."""
        look = self.collect()
        self.look_at(look)
        norm = norm_of([self.final(look, i) for i in look.members])
        if norm.finite:
            look.clip(shrink(norm, max_norm))
        if look.shown:
            self.apply(look)
            look.note()
        return norm

    def clip_by_torch(self, max_norm: float) -> Near:
        """torch.nn.utils.clip_grad_norm_ of what is in `p.grad`: what is not finite spreads."""
        grads = {i: grad for i in EVERY if (grad := self.grad(i)) is not None}
        norm = norm_of(list(grads.values()))
        by = shrink(norm, max_norm) if norm.finite else Near(max_norm) / norm
        for i, grad in grads.items():
            self.set_grad(i, grad * by)
        return norm

    def can_edit(self, i: int | None = None) -> bool:
        """Whether float32 gradients are there to be edited, of all or of one parameter."""
        look = self.look
        if look is None or not look.shown or look.narrow:
            return False
        if look.newcomers(self.having(), HALVES):
            return False
        return i is None or (i in look.members and self.grad(i) is not None)

    def zero_grad(self, *, set_to_none: bool) -> None:
        self.throw_away()
        for i in EVERY:
            grad = self.own[i]
            if grad is not None:
                self.set_grad(i, None if set_to_none else Near(np.zeros_like(grad.value)))
        self.zeroed = not set_to_none


def norm_of(grads: list[Near]) -> Near:
    with np.errstate(all="ignore"):
        squares = [grad * grad for grad in grads]
        total = sum(float(square.value.sum()) for square in squares)
        error = sum(float(np.sum(square.error)) for square in squares)
    # a sum of a dozen numbers in float32, in any order
    return Near(total, error + 4e-6 * abs(total)).sqrt()


def shrink(norm: Near, max_norm: float) -> Near:
    """What a clip multiplies by."""
    factor = Near(max_norm) / (norm + 1e-6)
    if factor.value > 1 + factor.error:
        return Near(1.0)
    return Near(min(float(factor.value), 1.0), factor.error)
