"""The wrapped optimizer's other doors: methods of its own, and its checkpoints."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import mpcore
import pytest
import torch
from mpcore import migration
from torch import nn

from mpcore_testing.bits import rounded, same_bits
from mpcore_testing.engines import ENGINES, Engine
from mpcore_testing.snapshots import snapshot

GENERAL = [engine for engine in ENGINES if not engine.fused]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
INF = float("inf")


class Averaging(torch.optim.SGD):
    """SGD whose parameters are swapped for their running average, as schedule-free ones do."""

    version = 3

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for param in self._all():
            mean = self.state[param].setdefault("mean", param.detach().clone())
            mean.lerp_(param, 0.25)
        return result

    @torch.no_grad()
    def eval(self) -> None:
        self._swap()

    @torch.no_grad()
    def train(self, mode: bool = True) -> str:
        self._swap()
        return f"train {mode}"

    @torch.no_grad()
    def fail_late(self) -> None:
        self._all()[0].add_(1.0)
        raise RuntimeError("no luck")

    def _swap(self) -> None:
        for param in self._all():
            mean = self.state[param].get("mean")
            if mean is not None:
                value = param.detach().clone()
                param.copy_(mean)
                mean.copy_(value)

    def _all(self) -> list[Any]:
        return [param for group in self.param_groups for param in group["params"]]


class Twins:
    """A wrapped optimizer over parameters of three dtypes, and the same over float32 copies."""

    def __init__(self, engine: Engine) -> None:
        values = torch.linspace(-1, 1, 12).view(3, 4)
        self.params = [nn.Parameter(value.to(d)) for value, d in zip(values, DTYPES, strict=True)]
        self.copies = [nn.Parameter(p.detach().float().clone()) for p in self.params]
        self.optimizer: Any = engine.wrap(
            Averaging(self.params, lr=0.01), mpcore.DynamicLossScale(2.0**6)
        )
        self.plain = Averaging(self.copies, lr=0.01)

    def step(self, number: int, *, overflow: bool = False) -> None:
        scale = float(self.optimizer.scale(torch.ones(())))
        for i, (param, other) in enumerate(zip(self.params, self.copies, strict=True)):
            grad = torch.arange(4.0) - i + 0.5 * number
            param.grad = (grad * scale).to(param.dtype)
            other.grad = param.grad.float() / scale
        if overflow:
            self.params[0].grad[0] = INF  # type: ignore[index]
        else:
            self.plain.step()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def masters(self) -> list[Any]:
        return [self.optimizer.state[p].get("master", p).detach() for p in self.params]

    def expect_alike(self) -> None:
        for param, master, other in zip(self.params, self.masters(), self.copies, strict=True):
            assert same_bits(master, other.detach())
            assert same_bits(param.detach(), rounded(master, param.dtype))


@pytest.mark.parametrize("engine", GENERAL, ids=str)
def test_a_method_of_the_wrapped_optimizer_acts_on_masters_and_weights_follow(
    engine: Engine,
) -> None:
    twins = Twins(engine)
    for number in range(9):
        twins.step(number, overflow=number in (0, 4))
        if number % 3 == 2:
            twins.optimizer.eval()
            twins.plain.eval()
            twins.expect_alike()
            assert twins.optimizer.check_masters() == []
            assert twins.optimizer.train(mode=False) == twins.plain.train(False) == "train False"
        twins.expect_alike()


@pytest.mark.parametrize("engine", GENERAL, ids=str)
def test_it_may_come_before_the_first_step_and_after_an_edit(engine: Engine) -> None:
    twins = Twins(engine)
    twins.optimizer.train()
    twins.expect_alike()
    twins.step(1)
    with torch.no_grad():
        for param, other in zip(twins.params[::2], twins.copies[::2], strict=True):
            param.fill_(0.5)
            other.fill_(0.5)
    with pytest.warns(UserWarning, match="were written to by others"):
        twins.optimizer.eval()
    twins.plain.eval()
    twins.expect_alike()


@pytest.mark.parametrize("engine", GENERAL, ids=str)
def test_masters_put_into_the_state_are_what_it_acts_on(engine: Engine) -> None:
    twins = Twins(engine)
    twins.step(1)
    for param, other in zip(twins.params[:2], twins.copies[:2], strict=True):
        finer = twins.optimizer.state[param]["master"].detach() * (1 + 2.0**-20)
        twins.optimizer.state[param]["master"] = finer
        other.data.copy_(finer)
    for one in (twins.optimizer, twins.plain):
        one.eval()
        one.train()  # which brings back what eval() has put aside
    twins.expect_alike()


@pytest.mark.parametrize("engine", GENERAL, ids=str)
@pytest.mark.parametrize("stage", ["scaled", "unscaled", "accumulated", "resumed"])
def test_gradients_that_wait_for_a_step_are_not_passed_by(engine: Engine, stage: str) -> None:
    twins = Twins(engine)
    twins.step(0)
    twins.optimizer.backward(torch.stack([p.float().sum() for p in twins.params]).sum())
    if stage == "unscaled":
        twins.optimizer.unscale_()
    if stage in ("accumulated", "resumed"):
        twins.optimizer.accumulate()
    if stage == "resumed":
        twins.optimizer.load_state_dict(copy.deepcopy(twins.optimizer.state_dict()))
    before = copy.deepcopy([twins.params, twins.masters()])
    with pytest.raises(
        mpcore.StageError, match=r"^eval\(\) of Averaging: .* zero_grad\(\) of this"
    ):
        twins.optimizer.eval()
    assert same_bits([twins.params, twins.masters()], before)
    if stage in ("accumulated", "resumed"):
        twins.optimizer.step()
    else:
        twins.optimizer.zero_grad()
        twins.step(1)
    twins.optimizer.zero_grad()
    twins.optimizer.eval()


def test_a_method_that_fails_in_the_middle_leaves_a_state_that_says_so() -> None:
    twins = Twins(GENERAL[0])
    twins.step(0)
    saved = copy.deepcopy(twins.optimizer.state_dict())
    with pytest.raises(RuntimeError, match="no luck"):
        twins.optimizer.fail_late()
    with pytest.raises(mpcore.StageError, match="expected whole masters"):
        twins.optimizer.state_dict()
    twins.optimizer.load_state_dict(saved)
    assert same_bits(twins.optimizer.state_dict(), saved)


def test_arguments_that_a_method_does_not_take_change_nothing() -> None:
    twins = Twins(GENERAL[0])
    twins.step(0)
    before = snapshot(twins.optimizer)
    with pytest.raises(TypeError, match="too many positional arguments"):
        twins.optimizer.eval(3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'model'"):
        twins.optimizer.train(model=None)
    assert same_bits(snapshot(twins.optimizer), before)
    twins.step(1)
    twins.expect_alike()


def test_only_public_methods_are_offered() -> None:
    optimizer = Twins(GENERAL[0]).optimizer
    assert not hasattr(optimizer, "version")  # no method
    for name in ("_swap", "evaluate", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"'MixedPrecisionOptimizer' .* '{name}'"):
            getattr(optimizer, name)
    plain = torch.optim.AdamW([nn.Parameter(torch.ones(2).half())])
    assert not hasattr(mpcore.MixedPrecisionOptimizer(plain), "eval")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_offer_them_too(copied: Any) -> None:
    twins = Twins(GENERAL[0])
    twins.step(0)
    other = copied(twins.optimizer)
    twins.optimizer.eval()
    other.eval()
    assert same_bits(snapshot(other), snapshot(twins.optimizer))


def test_checkpoints_of_the_wrapped_optimizer_name_the_wrappers(engine: Engine) -> None:
    params = [nn.Parameter(torch.ones(3).half())]
    inner = torch.optim.AdamW(params, lr=0.1)
    saved = inner.state_dict()
    optimizer = engine.wrap(inner, mpcore.StaticLossScale(2.0))
    before = snapshot(optimizer)
    for name, arguments in (("state_dict", ()), ("load_state_dict", (saved,))):
        with pytest.raises(
            mpcore.StageError, match=rf"^AdamW\.{name}\(\): .* {name}\(\) of the wr"
        ):
            getattr(inner, name)(*arguments)
    assert same_bits(snapshot(optimizer), before)
    assert inner.param_groups is optimizer.param_groups
    loaded = migration.from_torch(optimizer, saved)
    optimizer.load_state_dict(loaded)


def test_an_optimizer_without_its_wrapper_is_as_before() -> None:
    params = [nn.Parameter(torch.ones(3))]
    inner = torch.optim.AdamW(params, lr=0.1)
    optimizer: Any = mpcore.MixedPrecisionOptimizer(inner, mpcore.NoLossScale())
    del optimizer
    gc.collect()
    inner.load_state_dict(inner.state_dict())
