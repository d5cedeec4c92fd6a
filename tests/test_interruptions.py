"""An exception at any call of a backend: the step before, or a step that says it is half.

Calls are found by themselves: a clean run counts those into the backend, then each is made to fail,
before it or after it has done its work. Whoever goes on as the messages say ends with the bits of
the run in which nothing failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from mpcore.backends import resolve
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import ENGINES, Engine
from mpcore_testing.failing import Failing
from mpcore_testing.lengths import each_in_turn
from mpcore_testing.snapshots import copied, snapshot

RULE = mpcore.DynamicLossScale(init=2.0**6, growth_interval=2)
OVERFLOWS = 1  # the iteration that has one


class Run:
    """Three iterations of training, the second with an overflow, on a backend that may fail."""

    def __init__(self, engine: Engine, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
        name, backend = resolve(engine.backend, [torch.device("cpu")])
        self.backend = Failing(backend)
        monkeypatch.setattr("mpcore.engine.wrapper.resolve", lambda *_: (name, self.backend))
        values = torch.linspace(-1, 1, 6)
        dtypes = (torch.float16, torch.bfloat16, torch.float32)
        self.params = [nn.Parameter(values.to(dtype)) for dtype in dtypes]
        inner = torch.optim.AdamW(self.params, lr=0.1, foreach=False if not engine.fused else None)
        self.optimizer: Any = engine.wrap(inner, RULE, "always" if way == "always" else "adopt")
        self.loss = self.optimizer.add_loss("other", RULE) if way == "losses" else None
        self.way = way

    def loss_of(self, number: int, part: int) -> torch.Tensor:
        bad = torch.inf if number == OVERFLOWS and part == 0 else 1.0
        sizes = [number + 1.0, (part + 2.0) * bad, 0.5]
        parts = [(p.float() * s).sum() for p, s in zip(self.params, sizes, strict=True)]
        return torch.stack(parts).sum()

    def calls(self, number: int) -> list[Callable[[], Any]]:
        """The calls of one iteration, up to where gradients are cleared."""
        optimizer = self.optimizer

        def backward(part: int, by: Any = optimizer) -> Callable[[], Any]:
            return lambda: by.backward(self.loss_of(number, part))

        def closure() -> None:
            optimizer.zero_grad()
            optimizer.backward(self.loss_of(number, 0))

        def clip() -> Any:
            return torch.nn.utils.clip_grad_norm_(self.params, 0.5)

        ways: dict[str, list[Callable[[], Any]]] = {
            "step": [backward(0)],
            "always": [backward(0)],
            "clip": [backward(0), lambda: optimizer.clip_grad_norm_(0.5)],
            "unscale": [backward(0), optimizer.unscale_, clip],
            "unscale, clip": [
                *(backward(0), optimizer.unscale_),
                lambda: optimizer.clip_grad_norm_(0.5),
            ],
            "accumulate": [backward(0), optimizer.accumulate, backward(1), optimizer.accumulate],
            "losses": [backward(0), backward(1, self.loss)],
        }
        if self.way == "closure":
            return [lambda: optimizer.step(closure)]
        return [*ways[self.way], optimizer.step]

    def saved(self) -> Any:
        return copied((self.optimizer.state_dict(), self.params))

    def load(self, saved: Any) -> None:
        self.optimizer.load_state_dict(saved[0])
        with torch.no_grad():
            for param, value in zip(self.params, saved[1], strict=True):
                param.copy_(value)

    def iteration(self, number: int) -> None:
        """One iteration; goes on after the injected error as the messages say."""
        saved = self.saved()
        for _ in range(3):
            try:
                for call in self.calls(number):
                    self.insisting(call)
                break
            except mpcore.StageError as error:
                if "Load a checkpoint" not in str(error):  # then of zero_grad(), or it fails again
                    self.optimizer.zero_grad()
                    continue
                for refuses in (self.optimizer.step, self.optimizer.state_dict):
                    with pytest.raises(mpcore.StageError, match="expected whole"):
                        refuses()
                self.load(saved)
                self.optimizer.zero_grad()
        else:
            pytest.fail("nothing that the messages said has helped")
        self.optimizer.zero_grad()

    def insisting(self, call: Callable[[], Any]) -> None:
        """Calls once more after the injected error, as somebody in a notebook does."""
        try:
            call()
        except (KeyboardInterrupt, MemoryError):
            call()

    def train(self) -> Any:
        for number in range(3):
            self.iteration(number)
        return snapshot(self.optimizer), self.optimizer.state_dict()["mpcore"]


WAYS = ["step", "always", "clip", "unscale", "unscale, clip", "accumulate", "losses", "closure"]


CASES = [pytest.param(engine, way, id=f"{engine}-{way}") for engine in ENGINES for way in WAYS]
ERRORS = {"before": MemoryError, "after": KeyboardInterrupt}


@pytest.mark.parametrize(("engine", "way", "when"), each_in_turn(CASES, list(ERRORS)))
def test_an_exception_at_any_call_of_the_backend_corrupts_nothing(
    engine: Engine, way: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = Run(engine, way, monkeypatch)
    expected = clean.train()
    assert clean.optimizer.skipped_steps == 1
    assert clean.backend.calls > 5
    for number in range(clean.backend.calls):
        run = Run(engine, way, monkeypatch)
        run.backend.arm(number, when, ERRORS[when])
        assert same_bits(run.train(), expected), number
        assert run.backend.calls > number


@pytest.mark.parametrize("call", [0, 1])  # of 16-bit gradients, and of others
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("halves_only", [True, False])
def test_gradients_of_an_interrupted_unscale_reach_no_later_step(
    engine: Engine, call: int, when: str, halves_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masters may have them already; a parameter without a gradient must not step with them."""
    run = Run(engine, "unscale", monkeypatch)
    chosen = run.params[:2] if halves_only else run.params
    run.optimizer.backward(torch.stack([param.float().sum() for param in chosen]).sum())
    run.backend.arm(call, when, MemoryError)
    with pytest.raises(MemoryError):
        run.optimizer.unscale_()
    run.optimizer.zero_grad()
    before = snapshot(run.optimizer)["weights"]
    run.optimizer.step()  # over nothing
    run.optimizer.backward(run.params[0].float().sum())
    run.optimizer.step()
    after = snapshot(run.optimizer)["weights"]
    assert not torch.equal(after[0], before[0])
    assert same_bits(after[1:], before[1:])
