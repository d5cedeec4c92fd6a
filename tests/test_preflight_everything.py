"""`mpcore.preflight` looks at everything, tries what it recommends, and keeps what it promises."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from mpcore.monitoring.preflight import Preflight
from torch import Tensor, nn
from torch.nn import functional

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


class Net(nn.Module):
    """A model whose forward pass is a function, with buffers of any name."""

    def __init__(self, body: Callable[..., Any], **buffers: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.h, self.body = nn.Linear(4, 4), nn.Linear(4, 1), body
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


@dataclasses.dataclass
class Holder:
    first: Any
    second: Any = None


def normal(*shape: int) -> Tensor:
    return torch.randn(*(shape or (32, 4)), generator=torch.Generator().manual_seed(1))


def squared(output: Any) -> Tensor:
    return getattr(output, "first", output).float().square().mean()


def attention(net: Net, x: Tensor, mask: Tensor | float = 0.0, gain: float = 1.0) -> Tensor:
    q = net.l(x) * gain
    scores = q @ q.T
    scores = scores + (net.mask if hasattr(net, "mask") else mask)
    return net.h(scores.softmax(-1) @ x)


def rms(net: Net, x: Tensor, wide: bool) -> Tensor:
    y = net.l(x) * 1e3
    z = y.float() if wide else y
    return net.h((z / z.pow(2).mean(-1, keepdim=True).sqrt()).to(y.dtype))


def heavy(net: Net, x: Tensor) -> Tensor:
    net.l.weight.data.fill_(1e5)
    return net.h(net.l(x) * 1e-5)


MASK = torch.ones(32, 32).triu(1)
LOWEST = torch.finfo(F32).min
#: model, batch, loss, the formats that would be right
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[Any], Tensor], set[torch.dtype]]] = {
    "plain": (lambda: Net(lambda n, x: n.h(n.l(x))), normal(), squared, {F16}),
    "keyword": (
        lambda: Net(lambda n, x, raw: n.h(n.l(x) + raw - 1e5)),
        {"x": normal(), "raw": normal() + 1e5},
        squared,
        {F32},
    ),
    "nested": (
        lambda: Net(lambda n, given: n.h(n.l(given["q"]["x"][0] - 1e5))),
        ({"q": {"x": [normal() + 1e5]}},),
        squared,
        {F32},
    ),
    "dataclass": (
        lambda: Net(lambda n, given: n.h(n.l(given.first + 1e5))),
        Holder(normal() - 1e5),
        squared,
        {F32},
    ),
    "digits, no range": (
        lambda: Net(lambda n, x: n.h(n.l(x - 3000))),
        normal() + 3000,
        squared,
        {F32},
    ),
    "small input": (lambda: Net(lambda n, x: n.h(n.l(x * 1e9))), normal() * 1e-9, squared, {BF16}),
    "buffer": (
        lambda: Net(lambda n, x: n.h(n.l(x) * n.gain / 1e6), gain=torch.full((4,), 1e6)),
        normal(),
        squared,
        {BF16, F16},  # the latter if the buffer stays in float32
    ),
    "small buffer": (
        lambda: Net(lambda n, x: n.h(n.l(x) * n.gain * 1e10), gain=torch.full((4,), 1e-10)),
        normal(),
        squared,
        {BF16, F16},
    ),
    "scores": (lambda: Net(lambda n, x: attention(n, x, gain=400.0)), normal(), squared, {BF16}),
    "between": (lambda: Net(lambda n, x: n.h((n.l(x) * 1e6) / 1e6)), normal(), squared, {BF16}),
    "room": (lambda: Net(lambda n, x: n.h((n.l(x).abs() * 2e4) / 2e4)), normal(), squared, {BF16}),
    "underflow": (
        lambda: Net(lambda n, x: n.h((n.l(x) * 1e-5).pow(2) * 1e10)),
        normal(),
        squared,
        {BF16},
    ),
    "rms in float32": (lambda: Net(lambda n, x: rms(n, x, True)), normal(), squared, {F16}),
    "rms in 16 bits": (lambda: Net(lambda n, x: rms(n, x, False)), normal(), squared, {BF16}),
    "loss in 16 bits": (
        lambda: Net(lambda n, x: n.h(n.l(x))),
        normal(),
        lambda out: ((out * 2000).square() / 1e6).mean(),
        {BF16},
    ),
    "loss in float32": (
        lambda: Net(lambda n, x: n.h(n.l(x))),
        normal(),
        lambda out: ((out.float() * 2000).square() / 1e6).mean(),
        {F16},
    ),
    "mask of -1e9": (lambda: Net(attention, mask=-1e9 * MASK), normal(), squared, {F16}),
    "lowest mask": (lambda: Net(attention, mask=LOWEST * MASK), normal(), squared, {F16}),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1)),
        normal(),
        squared,
        {F16},
    ),
    "dataclass out": (
        lambda: Net(lambda n, x: Holder(n.h(n.l(x)), {"more": [n.l(x)]})),
        normal(),
        squared,
        {F16},
    ),
    "sum that cancels": (
        lambda: Net(lambda n, x: n.l(x)),
        normal(),
        lambda out: (out - out.detach().mean()).float().sum(),
        {F16},
    ),
    "integers": (
        lambda: nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 1)),
        torch.arange(10),
        squared,
        {F16},
    ),
    "raises": (
        lambda: Net(lambda n, x: n.h(n.l(x) @ torch.eye(4))),  # of two formats, once it is cast
        normal(),
        squared,
        {F32},
    ),
}
CASES["mask"] = (
    lambda: Net(attention, mask=torch.full((32, 32), -torch.inf).triu(1)),
    normal(),
    squared,
    {F16},
)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


@pytest.fixture(scope="module")
def found() -> dict[str, Preflight]:
    return {
        name: mpcore.preflight(made(make), given, loss)
        for name, (make, given, loss, _) in CASES.items()
    }


@pytest.mark.filterwarnings("ignore:cast_model. rounds buffers")
@pytest.mark.parametrize("name", CASES)
def test_the_recommended_step_is_as_promised(name: str, found: dict[str, Preflight]) -> None:
    """The oracle casts a copy and runs the step itself."""
    make, given, loss, right = CASES[name]
    one = found[name]
    assert one.dtype in right, str(one)
    if one.dtype == F32:
        assert one.loss_scale == 1
        return
    model = made(make)
    expected = loss(call(model, given))
    expected.backward()  # type: ignore[no-untyped-call]
    wide = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    model = mpcore.cast_model(made(make), one.dtype)
    got = loss(call(model, given))
    (got.float() * one.loss_scale).backward()  # type: ignore[no-untyped-call]
    if name == "dropout":
        return  # other units are dropped
    assert abs(got.item() - expected.item()) <= 0.03 * abs(expected.item()) + 0.01
    for n, param in model.named_parameters():
        if n in wide:
            assert param.grad is not None
            narrow = param.grad.double() / one.loss_scale
            assert (narrow - wide[n]).norm() <= 0.25 * wide[n].norm() + 1e-6


def call(model: nn.Module, given: Any) -> Any:
    given = copy.deepcopy(given)
    if isinstance(given, dict):
        return model(**given)
    return model(*given) if isinstance(given, tuple) else model(given)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("keyword", "given batch['raw']"),
        ("nested", "given batch[0]['q']['x'][0]"),
        # what is below the range is a mask's, and clamped
        ("dataclass", "begins in add in the forward pass of (the model), "),
        ("digits, no range", "bfloat16 does not do: the loss is"),
        ("scores", "begins in mm in the forward pass of (the model), "),
        ("between", "begins in mul in the forward pass of (the model), "),
        ("room", "mul (" + __file__),
        ("loss in 16 bits", "in the loss pass of loss_of"),
        ("raises", "a step raises RuntimeError: "),
    ],
)
def test_the_reason_names_what_it_was(name: str, words: str, found: dict[str, Preflight]) -> None:
    one = found[name]
    assert words in one.reason
    assert str(one).startswith("Use ")
    assert one.trials[-1].dtype == one.dtype or one.dtype == F32
    assert [trial.dtype for trial in one.trials if not trial.wrong] in ([one.dtype], [])


def test_what_would_be_harmed_is_listed_with_its_kind(found: dict[str, Preflight]) -> None:
    def kinds(name: str) -> set[tuple[str, str]]:
        problems = found[name].problems(F16)
        return {(one.kind, one.name.split(" (/")[0]) for one in problems}

    assert ("input", "batch['raw']") in kinds("keyword")
    assert ("input", "batch.first") in kinds("dataclass")
    assert ("input", "batch") in kinds("small input")
    assert ("activation", "(the model), mm") in kinds("scores")
    assert ("activation", "(the model), pow") in kinds("underflow")
    assert ("loss", "") not in kinds("loss in float32")
    assert kinds("mask") == kinds("lowest mask") == kinds("mask of -1e9") == set()
    assert not {name for kind, name in kinds("rms in float32") if kind == "activation"}
    one = next(one for one in found["buffer"].ranges if one.kind == "buffer")
    assert one.wide == (found["buffer"].dtype == F16)
    assert {one.kind for one in found["plain"].ranges} == {
        "input",
        "weight",
        "activation",
        "loss",
        "gradient",
        "weight gradient",
    }


def test_a_scale_at_which_an_operation_between_modules_overflows_comes_down() -> None:
    class Spread(nn.Module):
        """Gradients of 2^12 times those that modules see, between two of them."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.l = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.l(x))
            small = y * 2.0**-12
            return small * 2.0**12  # type: ignore[no-any-return]

    model = nn.Sequential(nn.Linear(4, 4), Spread(), nn.Linear(4, 1))
    found = mpcore.preflight(model, normal(), squared)
    assert found.dtype == F16
    overflowed = [trial for trial in found.trials if trial.overflowed_back]
    assert len(overflowed) == len(found.trials) - 1 >= 1
    assert found.loss_scale < overflowed[0].loss_scale
    assert "a gradient is not finite: it begins in mul in the backward pass of 1" in found.reason
    assert str(found).count("float16 was tried") == 1


def test_what_no_device_here_computes_is_said_to_be_untried() -> None:
    class Lacking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise NotImplementedError("\"lacking\" not implemented for 'Half'")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad

    model = Net(lambda n, x: n.h(Lacking.apply(n.l(x))))
    found = mpcore.preflight(model, normal(), squared)
    assert found.dtype == F16
    assert "Not tried: NotImplementedError" in found.reason
    assert "float16 was not tried" in str(found)
    # then sizes alone have to do
    found = mpcore.preflight(model, normal() * 1e5, lambda out: squared(out) * 1e-10)
    assert found.dtype == BF16


def test_functional_losses_of_modules_are_tried_too() -> None:
    model = Net(lambda n, x: n.l(x))
    target = torch.arange(32) % 4
    found = mpcore.preflight(
        model,
        normal(),
        lambda out: (
            functional.cross_entropy(out.float(), target) + 0.1 * model.l.weight.float().norm()
        ),
    )
    assert found.dtype == F16
    assert found.trials[0].gradient_error is not None
    assert found.trials[0].gradient_error < 0.01


def test_a_model_near_its_minimum_is_judged_by_what_rounded_weights_can_do() -> None:
    """Its gradients vanish, so that any rounding is a large share of them."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 16), torch.randint(4, (64,))
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def loss_of(out: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out.float(), y)

    for _ in range(200):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    optimizer.zero_grad()
    found = mpcore.preflight(model, x, loss_of)
    assert found.trials[0].gradient_error is not None
    assert found.dtype == torch.float16
