"""The operations of the sequences on gradients: passes, unscale, clip, edits, the step itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mpcore.errors import StageError
from torch import Tensor

from mpcore_testing.sequences.numbers import Near, rounded
from mpcore_testing.sequences.pair import Pair, Stops, flat, shaped
from mpcore_testing.sequences.state import EVERY, PARAMETERS


class OnGradients(Pair):
    """Each method drives both, the engine and its model."""

    def backward(self, grads: dict[int, list[float]]) -> None:
        loss = self.loss(grads)
        self.both(lambda: self.optimizer.backward(loss), lambda: self.model.backward(grads))

    def failing_backward(self) -> None:
        """The loss is scaled, and no gradient comes of it."""
        loss = self.loss({0: [1.0, 1.0, 1.0]})
        loss.register_hook(_stop)  # type: ignore[no-untyped-call]

        def engine() -> None:
            with pytest.raises(Stops):
                self.optimizer.backward(loss)

        self.both(engine, self.model.scale_once)

    def raw_backward(self, grads: dict[int, list[float]]) -> None:
        """A pass past the optimizer, while gradients are shown that it would add to."""
        shown = {i: values for i, values in grads.items() if self.model.can_edit(i)}
        if shown:
            with pytest.raises(StageError):
                self.loss(shown).backward()  # type: ignore[no-untyped-call]

    def scale(self) -> None:
        self.both(lambda: self.optimizer.scale(torch.ones(())), self.model.scale_once)

    def accumulate(self) -> None:
        self.both(self.optimizer.accumulate, self.model.accumulate)

    def late(self, i: int, values: list[float]) -> None:
        """A gradient that somebody makes where there is none, times the scale, in its dtype."""
        if self.model.grad(i) is not None:
            return
        stored = rounded(np.array(values) * self.model.scale.now, PARAMETERS[i][0])
        self.params[i].grad = shaped(stored, i)
        self.model.set_late(i, Near(stored))

    def unscale(self) -> None:
        self.both(self.optimizer.unscale_, self.model.unscale_)

    def clip(self, max_norm: float) -> None:
        norm, expected = self.both(
            lambda: self.optimizer.clip_grad_norm_(max_norm), lambda: self.model.clip(max_norm)
        )
        _check_norm(norm, expected)

    def clip_by_torch(self, max_norm: float) -> None:
        if self.model.can_edit() and self.model.having():
            norm = torch.nn.utils.clip_grad_norm_(self.params, max_norm)
            _check_norm(norm, self.model.clip_by_torch(max_norm))

    def edit_grad(self, i: int, kind: str, value: Any) -> None:
        """What users do to float32 gradients in `p.grad`."""
        if not self.model.can_edit(i):
            return
        param: Any = self.params[i]
        old = self.model.grad(i)
        assert old is not None
        if kind == "multiply":
            param.grad.mul_(value)
            new = rounded(old.value * float(np.float32(value)), "float32")
        elif kind == "add":
            param.grad.add_(value)
            new = rounded(old.value + float(np.float32(value)), "float32")
        elif kind == "write":
            param.grad.copy_(shaped(value, i))
            new = np.array(value)
        elif kind == "replace":
            param.grad = shaped(value, i).float()
            new = np.array(value)
        else:
            self.drop(i)
            return
        self.model.set_grad(i, Near(new))

    def drop(self, i: int) -> None:
        self.params[i].grad = None
        self.model.set_grad(i, None)

    def drop_all(self) -> None:
        """What `model.zero_grad()` does."""
        for i in EVERY:
            self.drop(i)

    def grads(self) -> None:
        """Those that `grads()` returns."""
        found, expected = self.both(self.optimizer.grads, self.model.grads)
        if expected is not None:
            assert len(found) == len(expected)
            for grad, near in zip(found, expected, strict=True):
                self.check_near("grads()", flat(grad), near)

    def zero_grad(self, set_to_none: bool) -> None:
        self.both(
            lambda: self.optimizer.zero_grad(set_to_none=set_to_none),
            lambda: self.model.zero_grad(set_to_none=set_to_none),
        )

    def step(self) -> None:
        self.both(self.optimizer.step, self.model.step)

    def failing_hook(self, when: str) -> None:
        """A hook of `step` raises: before it nothing was done, after it everything."""
        if when == "before":
            handle = self.optimizer.register_step_pre_hook(_stop)
        else:
            handle = self.optimizer.register_step_post_hook(_stop)

        def engine() -> None:
            with pytest.raises(Stops):
                self.optimizer.step()

        self.both(engine, (lambda: None) if when == "before" else self.model.step)
        handle.remove()

    def inner_step(self) -> None:
        """The wrapped optimizer refuses what is the wrapper's."""
        for call in (self.optimizer.inner.step, self.optimizer.inner.state_dict):
            with pytest.raises(StageError):
                call()

    def closure(self, grads: dict[int, list[float]], then: str, fails: str) -> None:
        """A step with a closure, after `zero_grad()`, which may fail at its beginning or end."""
        self.zero_grad(True)

        def evaluate() -> Tensor:
            if fails == "begin":
                raise Stops
            self.optimizer.zero_grad()
            loss = self.loss(grads)
            self.optimizer.backward(loss)
            if then == "clip":
                self.optimizer.clip_grad_norm_(0.5)
            elif then == "unscale":
                self.optimizer.unscale_()
                for i in grads:
                    self.params[i].grad.mul_(0.5)  # type: ignore[union-attr]
            if fails == "end":
                raise Stops
            return loss

        def engine() -> None:
            if fails:
                with pytest.raises(Stops):
                    self.optimizer.step(evaluate)
                self.optimizer.zero_grad()
            else:
                self.optimizer.step(evaluate)

        self.both(engine, lambda: self.model.step_with_closure(grads, then, fails))


def _stop(*_: Any) -> None:
    raise Stops


def _check_norm(norm: Any, expected: Near | None) -> None:
    if expected is None:
        return
    if expected.finite:
        Pair.check_near("norm", flat(norm), expected)
    else:
        assert not norm.isfinite(), f"norm: {norm}, expected one that is not finite"
