"""The model of the sequences until gradients are looked at: passes, and sums of them."""

from __future__ import annotations

import numpy as np

from mpcore_testing.sequences.numbers import Near, rounded
from mpcore_testing.sequences.state import EVERY, HALVES, PARAMETERS, Refused, State


class Passes(State):
    """What is in `p.grad`, and which call is out of turn."""

    def grad(self, i: int) -> Near | None:
        """What is in `p.grad`."""
        if self.look is not None and self.look.shown and i in self.look.held:
            return self.look.held[i]
        return self.own[i]

    def set_grad(self, i: int, value: Near | None) -> None:
        if self.look is not None and self.look.shown and i in self.look.held:
            self.look.held[i] = value
        else:
            self.own[i] = value
            self.left.pop(i, None)

    def settle_grad(self, i: int, value: Near) -> None:
        """Puts what was found to be near enough in its place."""
        if self.look is not None and self.look.shown and i in self.look.held:
            self.look.held[i] = value
        else:
            if i in self.failed and self.failed[i] is self.own[i]:
                self.failed[i] = value
            self.own[i] = value

    def set_late(self, i: int, value: Near) -> None:
        """A gradient in the parameter's dtype, where there was none."""
        self.set_grad(i, value)
        look = self.look
        if look is not None and look.shown and i in look.held and i in look.members:
            look.narrow.add(i)

    def having(self) -> list[int]:
        return [i for i in EVERY if self.grad(i) is not None]

    def scale_once(self) -> None:
        """`scale()`: a pass is to come."""
        self._check_open()
        for i, by in self.left.items():
            grad = self.own[i]
            assert grad is not None
            factor = self.scale.now if by is None else self.scale.now / by
            self.own[i] = Near(rounded(grad.value * factor, PARAMETERS[i][0]))
        self.left = {}
        self.scaled, self.zeroed = True, False

    def backward(self, grads: dict[int, list[float]]) -> None:
        self.scale_once()
        self.add(grads)

    def add(self, grads: dict[int, list[float]]) -> None:
        """What autograd does: rounded to the dtype, and added there."""
        for i, values in grads.items():
            dtype = PARAMETERS[i][0]
            new = rounded(np.array(values) * self.scale.now, dtype)
            old = self.own[i]
            with np.errstate(all="ignore"):
                self.own[i] = Near(new if old is None else rounded(old.value + new, dtype))

    def accumulate(self) -> None:
        self._check_open()
        if self.having():
            self._add_up()

    def _add_up(self) -> None:
        having = self.having()
        if having and not self.zeroed:
            self._check_scaled()
        self.made |= {i for i in having if i in HALVES}
        for i in having:
            grad = self.own[i]
            assert grad is not None
            unscaled = rounded(grad.value / self.scale.now, "float32")
            if not np.isfinite(unscaled).all():
                self.sums_found.add(i)
            if PARAMETERS[i][0] == "float16":
                self.sums_largest = max(self.sums_largest, float(np.abs(unscaled).max()))
            self.sums = {} if self.sums is None else self.sums
            if i in self.sums:
                with np.errstate(all="ignore"):
                    unscaled = rounded(self.sums[i].value + unscaled, "float32")
            self.sums[i] = Near(unscaled)
            self.set_grad(i, None)

    def _check_scaled(self) -> None:
        if self.scale.name != "none" and not self.scaled:
            raise Refused("gradients that were never scaled")

    def _check_open(self) -> None:
        if self.look is not None and self.look.is_dropped(self.grad):
            self.throw_away()
        self.leave_failed()
        if self.look is not None:
            raise Refused("this step's gradients were looked at")

    def note_failed(self) -> None:
        """A step was refused: what it has looked at may be cleared by anybody."""
        if self.look is not None and not self.look.shown:
            grads = {i: self.own[i] for i in self.look.members}
            self.failed = {i: grad for i, grad in grads.items() if grad is not None}

    def leave_failed(self) -> None:
        """A pass that has left none of a failed step's gradients begins the next step."""
        there = any(self.own[i] is not None for i in self.failed)
        if there and not any(self.own[i] is grad for i, grad in self.failed.items()):
            self.throw_away()

    def throw_away(self) -> None:
        """A step that nobody takes is a skipped one if a look has found an overflow."""
        if self.look is not None and self.look.seen and self.look.found:
            self.scale.count(overflow=True, largest=0.0)
        self.drop()

    def drop(self) -> None:
        """Nothing is collected any more; the model's own gradients are back."""
        if self.look is not None:
            if self.look.shown:
                for i in self.look.held:
                    if self.look.held[i] is None:
                        self.own[i] = None
                        self.left.pop(i, None)
            if self.look.summed:
                for i in self.look.members:  # of a 16-bit one it can be a late one
                    self.own[i] = self.own[i] if i in HALVES else None
        self.look, self.failed = None, {}
        self._forget_sums()

    def _forget_sums(self) -> None:
        self.sums, self.sums_found, self.sums_largest = None, set(), 0.0
