"""float16 gradients that flush without a loss scale: one warning with numbers, and no false one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mpcore
import numpy as np
import pytest
import torch
from mpcore.engine.flush_watch import FIRST
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from mpcore_testing.engines import GENERAL, Engine
from mpcore_testing.flushing import BRAIN, FULL, HALF, SAYS, Net


def by_backward(net: Net, size: float) -> None:
    """As a trainer does it that knows of no scale."""
    net.loss(size).backward()  # type: ignore[no-untyped-call]
    net.optimizer.step()
    net.model.zero_grad()


def by_clip(net: Net, size: float) -> None:
    net.optimizer.backward(net.loss(size))
    net.optimizer.clip_grad_norm_(1.0)
    net.optimizer.step()
    net.optimizer.zero_grad()


def by_unscale(net: Net, size: float) -> None:
    net.optimizer.backward(net.loss(size))
    net.optimizer.unscale_()
    nn.utils.clip_grad_norm_(net.model.parameters(), 1.0)
    net.optimizer.step()
    net.optimizer.zero_grad()


def by_accumulate(net: Net, size: float) -> None:
    net.optimizer.backward(net.loss(size))
    net.optimizer.accumulate()
    if net.passes % 4 == 0:
        net.optimizer.step()


def by_closure(net: Net, size: float) -> None:
    def closure() -> Tensor:
        net.optimizer.zero_grad()
        loss = net.loss(size)
        net.optimizer.backward(loss)
        return loss

    net.optimizer.step(closure)


WAYS: list[Callable[[Net, float], None]] = [
    *(Net.step, by_backward, by_clip, by_unscale, by_accumulate, by_closure)
]


def numbers_of(grads: list[Tensor]) -> list[str]:
    """What the warning has to say, by NumPy from the values."""
    values = np.concatenate([grad.detach().numpy().ravel() for grad in grads]).astype(np.float64)
    size = np.abs(values[np.isfinite(values)])
    some = size[size > 0]
    return [
        f"of {len(some)} values that are not 0",
        f"{np.mean(some < 2.0**-22):.1%} are below 2^-22",
        f"{np.mean(some < 2.0**-14):.1%} are below 2^-14",
        f"{np.mean(size == 0):.1%} of all values are 0",
        f"the largest is {size.max():.2g}",
    ]


# ------------------------------------------------------------------ what is warned of


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_gradients_that_flush_are_warned_of_once_in_the_eighth_pass(
    engine: Engine, way: Any
) -> None:
    net = Net(engine)
    for _ in range(FIRST - 1):
        way(net, 1e-5)
    with pytest.warns(UserWarning, match=SAYS):
        way(net, 1e-5)
    for _ in range(3 * FIRST):  # warnings are errors
        way(net, 1e-5)


@pytest.mark.parametrize("bad", [None, torch.inf, torch.nan])
def test_its_numbers_are_those_of_numpy(engine: Engine, bad: float | None) -> None:
    net = Net(engine)
    for _ in range(FIRST - 1):
        net.step(1e-5)
    net.optimizer.backward(net.loss(1e-5))
    if bad is not None:
        net.last.weight.grad[1, 2] = bad  # type: ignore[index]
    grads = [p.grad.clone() for p in net.model.parameters() if p.dtype == HALF]  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match=SAYS) as caught:
        net.optimizer.step()
    message = str(caught[0].message)
    assert [part for part in numbers_of(grads) if part not in message] == []


@pytest.mark.parametrize("size", [1e-8, torch.inf])
def test_where_all_are_zero_the_loss_tells_whether_they_may_be(engine: Engine, size: float) -> None:
    net = Net(engine)
    for _ in range(FIRST - 1):
        net.step(1e-8)
    net.optimizer.backward(net.loss(1e-8))
    for param in net.model.parameters():
        param.grad = torch.zeros_like(param)
    if size == torch.inf:
        net.optimizer.scale(net.loss(torch.inf))  # of which nobody knows what it means
        net.optimizer.step()
        return
    count = sum(p.numel() for p in net.model.parameters() if p.dtype == HALF)
    with pytest.warns(UserWarning, match=rf"{SAYS}: all {count} values are 0 although the loss is"):
        net.optimizer.step()


def test_zeros_beside_an_overflow_are_not_all_there_is(engine: Engine) -> None:
    net = Net(engine)
    for number in range(FIRST):
        net.optimizer.backward(net.loss(1e-8))
        for param in net.model.parameters():
            param.grad = torch.zeros_like(param)
        if number == FIRST - 1:
            net.last.weight.grad[0, 0] = torch.inf  # type: ignore[index]
        net.optimizer.step()


def test_where_all_are_zero_and_nobody_has_seen_the_loss_nothing_is_said(engine: Engine) -> None:
    net = Net(engine)
    for _ in range(2 * FIRST):
        by_backward(net, 1e-9)


def test_a_loss_of_add_loss_without_a_scale_is_looked_at_too(engine: Engine) -> None:
    net = Net(engine, mpcore.DynamicLossScale())
    other = net.optimizer.add_loss("other", mpcore.NoLossScale())
    for _ in range(FIRST - 1):
        other.backward(net.loss(1e-5))
        net.optimizer.step()
    with pytest.warns(UserWarning, match=SAYS):
        other.backward(net.loss(1e-5))


@pytest.mark.parametrize("advice", ["DynamicLossScale()", "mpcore.GradScaler"])
def test_its_advice_ends_it(engine: Engine, advice: str) -> None:
    net = Net(engine)
    for _ in range(FIRST - 1):
        net.step(1e-5)
    with pytest.warns(UserWarning, match=re.escape(advice)):
        net.step(1e-5)
    lost = [(p.grad == 0).sum() for p in flushed_and_not(net, net.optimizer.backward)]
    if advice == "DynamicLossScale()":
        net = Net(engine, mpcore.DynamicLossScale())
        kept = flushed_and_not(net, net.optimizer.backward)
    else:
        scaler = mpcore.GradScaler("cpu")
        kept = flushed_and_not(net, lambda loss: scaler.scale(loss).backward())
    assert all((p.grad == 0).sum() < 0.9 * n for p, n in zip(kept, lost, strict=True))


def flushed_and_not(net: Net, backward: Callable[[Tensor], Any]) -> list[Any]:
    net.optimizer.zero_grad()
    net.passes = 0
    backward(net.loss(1e-5))
    return [net.first.weight, net.last.weight]


# ------------------------------------------------------------------ what is not


def dead_units(net: Net, number: int) -> None:
    with torch.no_grad():
        net.first.weight[1:].zero_()
        net.first.bias[1:].fill_(-1.0)
    net.step(1.0)


def no_gradient(net: Net, number: int) -> None:
    net.step(0.0)


def scaled_by_hand(net: Net, number: int) -> None:
    net.step(1e-5 * 2.0**16)


def one_spike_to_zero(net: Net, number: int) -> None:
    """Between two looks, and in the first steps, all may be tiny."""
    net.step(1e-5 if number < FIRST or (number % 5 == 0 and number & (number - 1)) else 1.0)


def overflow(net: Net, number: int) -> None:
    net.step(torch.inf if number % 2 else 1.0)


def outside(kind: Any) -> Callable[[Net, int], None]:
    """A scaler with a scale that is much too low: it is the scaler's to know."""
    scalers: dict[int, Any] = {}

    def step(net: Net, number: int) -> None:
        scaler = scalers.setdefault(id(net), kind("cpu", init_scale=1.0))
        net.optimizer.zero_grad()
        scaler.scale(net.loss(1e-5)).backward()
        scaler.step(net.optimizer)
        scaler.update()

    return step


QUIET: dict[str, Callable[[Net, int], None]] = {
    "usual": lambda net, number: net.step(1.0),
    "a hundredth": lambda net, number: net.step(0.01),
    "dead units": dead_units,
    "no gradient": no_gradient,
    "scaled by hand": scaled_by_hand,
    "only at times": one_spike_to_zero,
    "overflow": overflow,
    "torch's scaler": outside(torch.amp.GradScaler),
    "our scaler": outside(mpcore.GradScaler),
}


@pytest.mark.parametrize("name", QUIET)
def test_there_is_no_false_alarm(engine: Engine, name: str) -> None:
    net = Net(engine)
    for number in range(1, 40):  # warnings are errors
        QUIET[name](net, number)


@pytest.mark.parametrize("dtype", [BRAIN, FULL])
def test_other_formats_are_no_business_of_it(engine: Engine, dtype: torch.dtype) -> None:
    net = Net(engine, dtype=dtype)
    for _ in range(2 * FIRST):
        net.step(1e-6)


@pytest.mark.parametrize(
    "scale", [mpcore.DynamicLossScale(), mpcore.StaticLossScale(1.0), mpcore.HeadroomLossScale()]
)
def test_who_has_chosen_a_scale_is_not_told(engine: Engine, scale: Any) -> None:
    net = Net(engine, scale)
    for _ in range(2 * FIRST):
        net.step(1e-5)


def test_wrappers_whose_values_mean_something_else_are_left_alone() -> None:
    value = torch.full((6, 4), 2.0**-24).half()
    param = nn.Parameter(TwoTensor(value, value.clone()))
    optimizer = GENERAL.wrap(torch.optim.SGD([param], lr=0.1), mpcore.NoLossScale())
    for _ in range(2 * FIRST):
        param.grad = TwoTensor(value.clone(), value.clone())
        optimizer.scale(torch.ones(()))
        optimizer.step()


def test_rows_that_nobody_uses_say_nothing(engine: Engine) -> None:
    table = nn.Embedding(1000, 4).half()
    optimizer = engine.wrap(torch.optim.SGD(table.parameters(), lr=0.1), mpcore.NoLossScale())
    for number in range(2 * FIRST):
        optimizer.backward(table(torch.tensor([number, 3])).float().square().mean())
        optimizer.step()
        optimizer.zero_grad()


def test_parameters_without_elements_and_expanded_gradients_are_counted(engine: Engine) -> None:
    params = [nn.Parameter(torch.ones(0, 3).half()), nn.Parameter(torch.ones(6, 4).half())]
    optimizer = engine.wrap(torch.optim.SGD(params, lr=0.1), mpcore.NoLossScale())

    def step() -> None:
        params[1].grad = torch.tensor(2.0**-24).half().expand(6, 4)
        params[0].grad = torch.zeros_like(params[0])
        optimizer.scale(torch.ones(()))
        optimizer.step()

    for _ in range(FIRST - 1):
        step()
    with pytest.warns(UserWarning, match="of 24 values that are not 0, 100.0% are below 2\\^-22"):
        step()
