"""What `mpcore.trace_overflow` and `preflight` make of masks, and of what is unusual in a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from mpcore.monitoring.trace import Frame, Trace
from torch import Tensor, nn


class Net(nn.Module):
    """Two layers, and whatever happens between them."""

    def __init__(self, between: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.between = nn.Linear(4, 4), nn.Linear(4, 1), between

    def forward(self, x: Tensor) -> Any:
        return self.last(self.between(self, self.first(x)))


def batch() -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def squared(output: Tensor) -> Tensor:
    return output.float().square().mean()


def first_of(trace: Trace) -> Frame:
    assert trace.first is not None
    assert trace.first in trace.frames
    return trace.first


def exponential(net: Net, y: Tensor) -> Tensor:
    return torch.exp(y + 200)


def test_masks_are_no_fault_however_they_are_made() -> None:
    low = torch.full((2, 4), -torch.inf)
    masks: list[Callable[[Tensor], Tensor]] = [
        lambda y: y + low.triu(1),
        lambda y: y.masked_fill(low.triu(1) < 0, -torch.inf),
        lambda y: torch.where(low.triu(1) < 0, -torch.inf, y),
        lambda y: y + torch.tensor([1.0, 0.0, 1.0, 1.0]).log(),
    ]
    for mask in masks:
        net = Net(lambda net, y, mask=mask: mask(y).softmax(-1))  # type: ignore[misc]
        assert mpcore.trace_overflow(net, batch(), squared).first is None
        net = Net(lambda net, y, mask=mask: mask(y).softmax(-1) / (y * 0))  # type: ignore[misc]
        assert first_of(mpcore.trace_overflow(net, batch(), squared)).operation == "div"


def test_what_torch_does_not_see_is_the_modules_that_handed_it_on() -> None:
    class Foreign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values = x.detach().numpy().copy()
            values[0, 0] = float("nan")
            return torch.from_numpy(values) + 0.0 * x.sum()

    model = nn.Sequential(nn.Linear(4, 4), Foreign(), nn.Linear(4, 1))
    first = first_of(mpcore.trace_overflow(model, batch(), squared))
    assert (first.phase, first.module) == ("forward", "1")


def test_empty_memory_is_no_fault() -> None:
    def filled(net: Net, y: Tensor) -> Tensor:
        memory = torch.empty(64, 4)
        memory[:2] = y
        return torch.cat([memory[:2], y.new_empty(0, 4)])

    torch.full((4096,), torch.nan)  # which empty memory may hold
    assert mpcore.trace_overflow(Net(filled), batch(), squared).first is None


def test_a_model_without_a_graph_is_traced_forward() -> None:
    net = Net(exponential).requires_grad_(False)
    assert first_of(mpcore.trace_overflow(net, batch(), squared)).operation == "exp"
    assert (
        mpcore.trace_overflow(Net(lambda n, y: y).requires_grad_(False), batch(), squared).first
        is None
    )


class Penalised(nn.Module):
    """Returns the gradient of its output, too, as a gradient penalty needs it."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.h, self.factor = nn.Linear(4, 4), nn.Linear(4, 1), factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = self.h(torch.tanh(self.l(x)))
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y, grad * self.factor


def penalty(output: tuple[Tensor, Tensor]) -> Tensor:
    y, grad = output
    return y.float().mean() + (grad.float().norm(dim=-1) - 1).square().mean()


def test_a_gradient_penalty_is_seen_through() -> None:
    trace = mpcore.trace_overflow(Penalised(), batch(), penalty)
    assert trace.first is None
    assert sum(frame.phase == "backward" for frame in trace.frames) == 4  # l, h, model, loss
    assert mpcore.preflight(Penalised(), batch(), penalty).dtype == torch.float16
    first = first_of(mpcore.trace_overflow(Penalised(1e30), batch(), penalty))
    assert (first.phase, first.module) == ("loss", "loss_of")
    assert first.line.endswith("(grad.float().norm(dim=-1) - 1).square().mean()")


class PerSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.vmap(lambda row: (self.l(row) * 1e4).exp())(x)
        return result


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.l(x)
        return y + (y.detach().to(torch.float8_e4m3fn).to(y.dtype) - y.detach())


def test_transforms_and_other_formats_are_seen_through() -> None:
    first = first_of(mpcore.trace_overflow(PerSample(), batch(), squared))
    assert (first.phase, first.operation) == ("forward", "exp")
    assert mpcore.trace_overflow(Quantised(), batch(), squared).first is None
    assert mpcore.preflight(Quantised(), batch(), squared).dtype == torch.float16
    table = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 1))
    given = torch.arange(8)
    found = mpcore.preflight(table, given, squared)
    assert ("weight gradient", "0.weight") in {(one.kind, one.name) for one in found.ranges}
    first = first_of(mpcore.trace_overflow(table, given, lambda out: out.sum() * 3e38 * 10))
    assert first.phase == "loss"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_seen_through(backend: str) -> None:
    torch.compiler.reset()
    model = torch.compile(Net(exponential), backend=backend)
    first = first_of(mpcore.trace_overflow(model, batch(), squared))
    assert (first.phase, first.operation) == ("forward", "exp")
    model(batch())  # and still runs
