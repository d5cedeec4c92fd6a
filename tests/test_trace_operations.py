"""`mpcore.trace_overflow` names the first operation, whoever does it, and the line of code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mpcore
import pytest
import torch
from mpcore.monitoring.trace import Frame, Trace
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

HERE = Path(__file__)
LINES = HERE.read_text(encoding="utf-8").splitlines()


def line_with(mark: str) -> str:
    """`file:number` of the line that ends with a mark."""
    (number,) = [at for at, line in enumerate(LINES, start=1) if line.endswith(f"# {mark}")]
    return f"{HERE}:{number}"


class Net(nn.Module):
    """Two layers, and whatever happens between them."""

    b: Tensor

    def __init__(self, between: Callable[[Net, Tensor], Any], half: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.between = nn.Linear(4, 4), nn.Linear(4, 1), between
        if half:
            self.half()

    def forward(self, x: Tensor) -> Any:
        return self.last(self.between(self, self.first(x)))


def batch(half: bool = False) -> Tensor:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    return x.half() if half else x


def squared(output: Tensor) -> Tensor:
    return output.float().square().mean()


def first_of(trace: Trace) -> Frame:
    assert trace.first is not None
    assert trace.first in trace.frames
    assert trace.first.line in str(trace)
    return trace.first


def exponential(net: Net, y: Tensor) -> Tensor:
    z = y + 200
    return torch.exp(z)  # exp


def product(net: Net, y: Tensor) -> Tensor:
    y = y * 1e20
    return y @ (torch.ones(4, 4) * 1e20)  # matmul


def scores(net: Net, y: Tensor) -> Tensor:
    q = y * 400
    weights = q @ q.T  # scores
    return weights.softmax(-1) @ y


def total(net: Net, y: Tensor) -> Tensor:
    return y + torch.full((4,), 3e38).sum()  # sum


def nothing_left(net: Net, y: Tensor) -> Tensor:
    rows = torch.tensor([[True], [False]])
    masked = y.masked_fill(rows, -torch.inf)
    return torch.softmax(masked, -1)  # softmax


def divided(net: Net, y: Tensor) -> Tensor:
    zero = y.detach() * 0
    return y / zero  # div


def normalised(net: Net, y: Tensor) -> Tensor:
    y = y * 0
    return y / y.norm()  # norm


def in_place(net: Net, y: Tensor) -> Tensor:
    y = y.mul_(1e30)
    y.mul_(1e30)  # in place
    return y


def part(net: Net, y: Tensor) -> Tensor:
    y = y.clone()
    y[:, 1:].mul_(2)
    y[:1].div_(0)  # part
    return y


def without_graph(net: Net, y: Tensor) -> Tensor:
    with torch.no_grad():
        factor = torch.exp(y + 200)  # no grad
    return y * factor


def checkpointed(net: Net, y: Tensor) -> Tensor:
    def inner(t: Tensor) -> Tensor:
        return (t + 200).exp()  # checkpoint

    result: Tensor = checkpoint(inner, y, use_reentrant=False)
    return result


def a_mask_and_more(net: Net, y: Tensor) -> Tensor:
    mask = torch.full((2, 4), -torch.inf).triu(3)
    large = y.detach().abs() + 3e38
    return (mask + large * 10).softmax(-1)  # beside a mask


def not_a_number(net: Net, y: Tensor) -> Tensor:
    return y + torch.tensor([torch.nan, 0.0, 0.0, 0.0])  # constant


FORWARD = {
    "exp": (exponential, "exp"),
    "matmul": (product, "mm"),
    "sum": (total, "sum"),
    "softmax": (nothing_left, "softmax"),
    "div": (divided, "div"),
    "norm": (normalised, "div"),
    "in place": (in_place, "mul_"),
    "part": (part, "div_"),
    "no grad": (without_graph, "exp"),
    "checkpoint": (checkpointed, "exp"),
    "beside a mask": (a_mask_and_more, "mul"),
    "constant": (not_a_number, "lift_fresh"),
}


@pytest.mark.parametrize("mark", FORWARD)
def test_an_operation_outside_any_submodule_is_named_with_its_line(mark: str) -> None:
    between, operation = FORWARD[mark]
    first = first_of(mpcore.trace_overflow(Net(between), batch(), squared))
    assert (first.phase, first.module, first.operation) == ("forward", "", operation)
    assert first.line.startswith(
        f"{line_with(mark)}, in {between.__name__ if mark != 'checkpoint' else 'inner'}"
    )
    assert first.line.endswith(f"# {mark}")
    assert not first.finite_out


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_is_named_by_the_line_of_what_it_differentiates(reentrant: bool) -> None:
    def root(net: Net, y: Tensor) -> Tensor:
        squares = (y * 0).pow(2).sum(-1, keepdim=True)
        return y + squares.sqrt()  # sqrt

    def again(net: Net, y: Tensor) -> Tensor:
        result: Tensor = checkpoint(root, net, y, use_reentrant=reentrant)
        return result

    for between in (root, again):
        first = first_of(mpcore.trace_overflow(Net(between), batch(), squared))
        assert (first.phase, first.module) == ("backward", "")
        assert first.operation == "div of SqrtBackward0"
        assert first.line.startswith(f"{line_with('sqrt')}, in root")


def test_a_gradient_of_what_was_not_selected_is_named() -> None:
    def selected(net: Net, y: Tensor) -> Tensor:
        logarithms = (y * 0).log()  # not selected
        return torch.where(y > 1e9, logarithms, y)

    first = first_of(mpcore.trace_overflow(Net(selected), batch(), squared))
    assert (first.phase, first.operation) == ("backward", "div of LogBackward0")
    assert first.line.startswith(line_with("not selected"))


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        none = grad.abs().sum() * 0
        return grad / none  # custom backward


def test_a_custom_backward_pass_is_named_by_its_own_line() -> None:
    first = first_of(mpcore.trace_overflow(Net(lambda net, y: Halved.apply(y)), batch(), squared))
    assert (first.phase, first.operation) == ("backward", "div of HalvedBackward")
    assert first.line.startswith(f"{line_with('custom backward')}, in backward")


def test_a_loss_function_is_named_by_its_line() -> None:
    def loss(output: Tensor) -> Tensor:
        gone = output.detach() * 0
        shares = output / gone  # loss
        return shares.mean()

    first = first_of(mpcore.trace_overflow(Net(lambda net, y: y), batch(), loss))
    assert (first.phase, first.module, first.kind, first.operation) == (
        "loss",
        "loss_of",
        "loss",
        "div",
    )
    assert first.line.startswith(line_with("loss"))
    first = first_of(
        mpcore.trace_overflow(
            Net(lambda net, y: y),
            batch(),
            lambda out: functional.cross_entropy(out, torch.tensor([-100, -100])),  # no target
        )
    )
    assert (first.phase, first.operation) == ("loss", "nll_loss_forward")
    assert first.line.startswith(line_with("no target"))


def test_a_loss_scale_that_is_too_high_is_the_losss() -> None:
    first = first_of(
        mpcore.trace_overflow(Net(lambda net, y: y), batch(), squared, loss_scale=2.0**127 * 16)
    )
    assert (first.phase, first.module) == ("backward", "loss_of")
    net = Net(lambda net, y: y, half=True)
    first = first_of(mpcore.trace_overflow(net, batch(half=True), squared, loss_scale=2.0**40))
    assert first.operation == "cast to float16 of ToCopyBackward0"
    assert "output.float().square().mean()" in first.line


@dataclasses.dataclass
class Output:
    logits: Any
    more: Any = None


def into_dataclass(net: Net, y: Tensor) -> Tensor:
    return y


@pytest.mark.parametrize(
    "wrap", [Output, lambda x: SimpleNamespace(logits={"a": [x]}), lambda x: [{"logits": x}]]
)
def test_outputs_of_any_kind_are_looked_into(wrap: Callable[[Tensor], Any]) -> None:
    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return wrap((self.l(x) + 200).exp())  # wrapped

    def loss(output: Any) -> Tensor:
        found: list[Tensor] = []
        torch.utils._pytree.tree_map_only(Tensor, found.append, getattr(output, "logits", output))
        return found[0].mean()

    trace = mpcore.trace_overflow(nn.Sequential(Wrapping()), batch(), loss)
    first = first_of(trace)
    assert (first.module, first.operation) == ("0", "exp")
    assert first.line.startswith(line_with("wrapped"))
    outer = next(frame for frame in trace.frames if frame.kind == "Sequential")
    assert not outer.finite_out


@pytest.mark.filterwarnings("ignore:cast_model. the batch holds")
@pytest.mark.parametrize("kind", [lambda x: {"x": x}, lambda x: (x,), lambda x: x])
def test_a_batch_that_a_cast_makes_infinite_is_named(kind: Callable[[Tensor], Any]) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.l(x)

    x = torch.full((2, 4), 7e4)
    model = mpcore.cast_model(Plain(), torch.float16)
    first = first_of(mpcore.trace_overflow(model, kind(x), squared))
    assert (first.phase, first.operation) == ("batch", "cast to float16")
    assert first.finite_in
    assert first.tensor.startswith("batch")
    assert first.largest_in == 7e4
    with torch.autocast("cpu", torch.float16):
        first = first_of(mpcore.trace_overflow(Plain(), kind(x), squared))
    assert (first.phase, first.operation) == ("batch", "cast to float16")
    assert first.line.endswith("return self.l(x)")
    inside = Plain()
    inside.forward = lambda x: inside.l(x.half().float())  # type: ignore[method-assign] # half
    first = first_of(mpcore.trace_overflow(inside, kind(x), squared))
    assert first.line.startswith(line_with("half"))


def test_a_tensor_of_the_batch_is_named_by_its_place() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 1)

        def forward(self, given: Any) -> Tensor:
            return self.l(given.logits["x"][0]) + self.l(given.more)

    x = batch()
    x[0, 0] = torch.nan
    given = (Output({"x": [x]}, more=batch()),)
    first = first_of(mpcore.trace_overflow(Nested(), given, squared))
    assert (first.phase, first.tensor) == ("batch", "batch[0].logits['x'][0] (NaN)")
    assert not first.finite_in


def test_weights_and_buffers_are_named() -> None:
    net = Net(lambda net, y: y - net.b)  # subtracts
    net.register_buffer("b", torch.tensor([0.0, torch.inf, 0.0, 0.0]))
    first = first_of(mpcore.trace_overflow(net, batch(), squared))
    assert (first.phase, first.tensor) == ("forward", "buffer b")
    assert first.line.startswith(line_with("subtracts"))
    net = Net(lambda net, y: y)
    with torch.no_grad():
        net.last.weight[0, 0] = torch.nan
    first = first_of(mpcore.trace_overflow(net, batch(), squared))
    assert (first.module, first.tensor) == ("last", "weight last.weight")
    assert "of the weight last.weight" in str(mpcore.trace_overflow(net, batch(), squared))
