"""What must hold after each operation on an engine, in NumPy's float64; nothing of mpcore is in it.

It follows what the documentation promises, and what is in memory: which gradient is in `p.grad`, by
what it is scaled, which call is out of turn. `Refused` is where an engine has to raise StageError.
Arrays are flat. Between two operations they are exact: whoever compares puts what the engine has,
once it was found to be near enough, in the place of what was computed here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpcore_testing.sequences.clips import Clips
from mpcore_testing.sequences.look import Look
from mpcore_testing.sequences.numbers import Near
from mpcore_testing.sequences.optimizers import update
from mpcore_testing.sequences.state import EVERY, HALVES, PARAMETERS, Refused


class Model(Clips):
    """Steps, and what happens to weights and states between them."""

    def step(self) -> None:
        if self._creates_state():
            self._create_state()
            return
        try:
            look = self.collect()
            self.adopt()
        except Refused:
            self.note_failed()
            raise
        self.finish(look)

    def _creates_state(self) -> bool:
        """Checkpoint tools step over zeros once, before anything else."""
        if self.began or self.scaled or self.look is not None or self.sums is not None:
            return False
        grads = [grad.value for i in EVERY if (grad := self.own[i]) is not None]
        return bool(grads) and all((grad == 0).all() for grad in grads)

    def _create_state(self) -> None:
        for i in self.having():
            if i in HALVES:
                self.made.add(i)
            _, self.moments[i] = self._updated(i, Near(np.zeros_like(self.masters[i].value)))
            self.counts[i] += 1

    def _updated(self, i: int, grad: Near) -> tuple[Near, list[Near]]:
        rate = self.rates[PARAMETERS[i][1]]
        now = (self.masters[i], self.moments[i], grad, rate, self.counts[i] + 1)
        return update(self.optimizer, *now)

    def after_adoption(self, i: int) -> Near:
        taken = self.differs(i) & np.isfinite(self.weights[i])
        return Near(np.where(taken, self.weights[i], self.masters[i].value))

    def adopt(self) -> None:
        """Weights that somebody wrote to become masters, by element."""
        refused = False
        for i in sorted(self.made):
            differs, finite = self.differs(i), np.isfinite(self.weights[i])
            taken = differs & finite
            self.masters[i] = self.after_adoption(i)
            refused = refused or bool((differs & ~finite).any())
            if taken.any() and i not in self.warned:
                self.adopted += int(taken.sum())
                self.warned.add(i)
        if refused:
            raise Refused("a weight that was written is not finite")

    def finish(self, look: Look) -> None:
        self.scaled = False
        if not look.members:  # a step that nobody takes
            self.throw_away()
            self.last = None
            return
        self.look_at(look)
        if not look.found:
            for i in look.members:
                self.masters[i], self.moments[i] = self._updated(i, self.final(look, i))
                self.counts[i] += 1
                self.weights[i] = None
        if not self.fused and not look.applied:
            self.apply(look)
        in_place = {i for i in look.members if i not in HALVES} if look.applied else set()
        by = self.scale.now
        self.last = look.found, by
        self.scale.count(overflow=look.found, largest=look.largest or 0.0)
        self.drop()
        self.left = {i: None if i in in_place else by for i in self.having()}
        self.began = True

    def step_with_closure(self, grads: dict[int, list[float]], then: str, fails: str) -> None:
        """One evaluation; if it fails, the step was none, and gradients are cleared."""
        self._check_loaded()
        self.adopt()
        if fails != "begin":
            self.backward(grads)
            if then == "clip":
                self.clip(0.5)
            elif then == "unscale":
                self.unscale_()
                for i in grads:
                    grad = self.grad(i)
                    assert grad is not None
                    self.set_grad(i, grad.times_power_of_two(0.5))
        if fails:
            if not self.fused:  # before the closure, whose step may move whatever there is
                self.made |= set(HALVES)
            self.drop()
            self.lose_gradients()
            self.scaled = False
            return
        look = self.collect()
        self.adopt()
        self.finish(look)

    # ------------------------------------------------------------------ between steps

    def edit_weight(self, i: int, values: Any) -> None:
        self.weights[i] = np.array(values)
        if i not in self.made:
            self.masters[i] = Near(values)

    def sync(self, *, exact: bool) -> None:
        for i in self.made:
            taken = self.differs(i) | exact
            self.masters[i] = Near(np.where(taken, self.weights[i], self.masters[i].value))
        self.never_fitted = set()

    def lose_gradients(self) -> None:
        """They are in no checkpoint and in no copy; nor is what was seen of them."""
        sums = self.sums, self.sums_found, self.sums_largest
        self.drop()
        self.sums, self.sums_found, self.sums_largest = sums
        self.own, self.left, self.zeroed = [None for _ in EVERY], {}, False

    def take_gradients_of(self, other: Model) -> None:
        """The gradients of a model whose state was replaced by this one's."""
        self.look = None
        self.own, self.left, self.zeroed = other.own, other.left, other.zeroed

    def begin_anew(self, *, loaded: bool) -> None:
        """What does not outlive a load or a copy; sums do."""
        sums = self.sums, self.sums_found, self.sums_largest
        self.drop()
        self.sums, self.sums_found, self.sums_largest = sums
        self.scaled, self.last, self.warned = False, None, set()
        if loaded:
            self.began, self.never_fitted = True, set(self.made)
