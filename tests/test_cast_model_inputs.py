"""Inputs of a cast model: masks stay masks, vectors keep their digits, too large ones are named."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mpcore import cast_model
from torch import Tensor, nn

HALF = [torch.float16, torch.bfloat16]
Named = namedtuple("Named", "hidden veil")


@dataclasses.dataclass
class Record:
    veil: Tensor


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, veil: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(8) + veil
        return scores.softmax(-1) @ v  # type: ignore[no-any-return]


class Holder(nn.Module):
    """Hands what it is given to an attention inside, wherever the mask is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Attention()])

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x, veil = _find(args, kwargs)
        return self.inner[0](x, veil)  # type: ignore[no-any-return]


def _find(args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """The input and the mask, wherever they are."""
    found: list[Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Record):
            walk(value.veil)
        elif isinstance(value, dict | UserDict):
            for item in value.values():
                walk(item)
        elif isinstance(value, tuple | list):
            for item in value:
                walk(item)

    walk([*args, kwargs])
    return found[0], found[1]


WAYS: dict[str, Any] = {
    "args": lambda x, veil: ((x, veil), {}),
    "kwargs": lambda x, veil: ((x,), {"veil": veil}),
    "a dict": lambda x, veil: (({"x": x, "deep": {"veil": veil}},), {}),
    "a list": lambda x, veil: (([x, [veil]],), {}),
    "a dataclass": lambda x, veil: ((x, Record(veil)), {}),
    "a UserDict": lambda x, veil: ((x, UserDict(veil=veil)), {}),
    "a named tuple": lambda x, veil: ((Named(x, veil),), {}),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("lowest", [-1e4, -1e9, torch.finfo(torch.float32).min, -1e300])
@pytest.mark.parametrize("way", WAYS)
def test_a_mask_given_in_any_way_masks_as_in_fp32(
    way: str, lowest: float, dtype: torch.dtype
) -> None:
    """The second row is padded all over, which an infinity would make NaN. Nobody uses it: a sum
    with -1e9 has lost its scores in FP32 as well."""
    torch.manual_seed(0)
    plain = Holder()
    model = cast_model(copy.deepcopy(plain), dtype)
    x, keep = torch.randn(2, 3, 8), torch.tensor([[1.0, 1, 0], [0, 0, 0]])
    veil = (1 - keep.double())[:, None, :] * lowest
    args, kwargs = WAYS[way](x, veil)
    expected = plain(x, veil.clamp(min=torch.finfo(torch.float32).min).float())
    ours = model(*args, **kwargs).float()
    assert ours.isfinite().all()
    ours, expected = ours[0], expected[0]
    assert (ours - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert veil.min() == lowest


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_infinities_of_a_mask_stay(dtype: torch.dtype) -> None:
    model = cast_model(Holder(), dtype)
    veil = torch.tensor([[[0.0, -torch.inf, 0.0]]])
    x = torch.randn(1, 3, 8)
    other = x.clone()
    other[:, 1] += 1
    seen = []
    model.inner[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    rows = torch.tensor([0, 2])
    assert torch.equal(model(x, veil)[:, rows], model(other, veil)[:, rows])
    assert seen[0].dtype == dtype
    assert torch.equal(seen[0].float(), veil)


def test_inputs_that_carry_gradients_are_not_clamped() -> None:
    model = cast_model(nn.Sequential(nn.Identity(), nn.Linear(1, 1)), torch.float16)
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for requires_grad in (False, True):
        model(torch.tensor([[-1e9]], requires_grad=requires_grad))
    assert [x.item() for x in seen] == [-65504.0, -torch.inf]


@pytest.mark.parametrize(
    ("args", "kwargs", "name"),
    [
        ((torch.full((2, 4), 1e5),), {}, r"args\[0\] \(100000\)"),
        (({"pixels": [torch.full((2, 4), 65521.0)]},), {}, r"args\[0\]\['pixels'\]\[0\] \(65521\)"),
        ((), {"wave": torch.full((2, 4), 1e6, dtype=torch.float64)}, r"wave \(1e\+06\)"),
    ],
)
def test_a_batch_that_fp16_does_not_hold_is_named_once(args: Any, kwargs: Any, name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, given: Any = None, wave: Any = None) -> Tensor:
            x = given["pixels"][0] if isinstance(given, dict) else given
            return self.linear(wave if x is None else x)  # type: ignore[no-any-return]

    model = cast_model(Model(), torch.float16)
    with pytest.warns(UserWarning, match=f"batch holds values .* infinite, in {name}"):
        result = model(*args, **kwargs)
    assert not result.isfinite().any()
    model(*args, **kwargs)  # warnings are errors here
    cast_model(Model(), torch.bfloat16)(*args, **kwargs)


@pytest.mark.parametrize("value", [65504.0, 65519.0, torch.inf, -1e9, torch.nan])
def test_a_batch_that_is_held_or_infinite_by_itself_is_not_named(value: float) -> None:
    cast_model(nn.Linear(4, 4), torch.float16)(torch.full((2, 4), value))


class Denoiser(nn.Module):
    """Embeds a time by sines, beside a parameter of its own; the time's name says nothing."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(16)) if own else None
        self.embed = nn.Sequential(nn.Linear(16, 16), nn.SiLU())
        self.body = nn.Linear(16, 16)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor, when: Tensor) -> Tensor:
        angles = when.reshape(-1, 1) * 10000 ** (-torch.arange(8) / 8)
        self.seen = torch.cat([angles.cos(), angles.sin()], -1)
        y = x + self.embed(self.seen)
        return self.body(y if self.shift is None else y + self.shift)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("when", [torch.tensor([999.0, 2049.0]), torch.tensor(777.5)])
def test_times_keep_their_digits_until_a_layer_takes_them(
    when: Tensor, own: bool, wrapped: bool, dtype: torch.dtype
) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Denoiser(own)

        def forward(self, x: Tensor, when: Tensor) -> Tensor:
            return self.net(x, when)  # type: ignore[no-any-return]

    plain = Wrapper() if wrapped else Denoiser(own)
    model = cast_model(copy.deepcopy(plain), dtype)
    x = torch.randn(2, 16)
    ours, theirs = model(x, when), plain(x, when)
    assert ours.dtype == dtype
    assert type(ours) is Tensor
    seen, expected = ((m.net if wrapped else m).seen for m in (model, plain))
    assert torch.equal(seen, expected)
    assert (ours.float() - theirs).abs().max() <= 8 * torch.finfo(dtype).eps


def test_a_layer_takes_one_dimensional_inputs_in_16_bits() -> None:
    assert cast_model(nn.Linear(4, 4), torch.float16)(torch.ones(4)).dtype == torch.float16
    model = cast_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.float16)
    assert model(torch.ones(4)).dtype == torch.float16


class Graph(nn.Module):
    """Sums weighted messages along edges, whose weights are a vector of FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor, strength: Tensor) -> Tensor:
        h = self.linear(x)
        summed = torch.zeros_like(h).index_add_(0, edges[1], strength[:, None] * h[edges[0]])
        return self.out(F.relu(summed))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_vector_among_the_inputs_meets_16_bits_like_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Graph()
    model = cast_model(copy.deepcopy(plain), dtype)
    x, edges, strength = torch.randn(5, 4), torch.randint(5, (2, 9)), torch.rand(9)
    ours = model(x, edges, strength)
    assert ours.dtype == dtype
    assert (ours.float() - plain(x, edges, strength)).abs().max() <= 8 * torch.finfo(dtype).eps
    halves = model(x, edges, strength.to(dtype))
    assert torch.equal(ours, halves)


def test_a_result_is_a_plain_tensor() -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, when: Tensor) -> dict[str, Any]:
            return {"y": self.linear(x), "more": [when, when * 2]}

    when = torch.tensor([999.0])
    result = cast_model(Echo(), torch.bfloat16)(torch.ones(1, 4), when)
    assert [type(each) for each in result["more"]] == [Tensor, Tensor]
    assert torch.equal(result["more"][1], when * 2)


def test_a_cast_model_can_be_mapped_over() -> None:
    model = cast_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.float16)
    x = torch.randn(3, 4)
    result, expected = torch.func.vmap(model)(x), model(x)
    assert (result - expected).abs().max() <= 2 * torch.finfo(torch.float16).eps


class Using(nn.Module):
    """Uses a vector or a number in a way of one's choice, beside layers and a weight of its own."""

    def __init__(self, way: Any) -> None:
        super().__init__()
        self.layer, self.own = nn.Linear(4, 4), nn.Parameter(torch.eye(4))
        self.way = way

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        y = self.layer(x)
        return self.way(self, y, v)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("way", "given"),
    [
        (lambda m, y, v: (y @ y.T + v).softmax(-1) @ y, torch.tensor([0.0, 0, -1e9, 0])),
        (lambda m, y, v: (y @ y.T + v).softmax(-1) @ y, torch.full((4,), -1e9)),
        (lambda m, y, v: y + m.layer(v @ m.own + v), torch.tensor([0.1, 0.2, 0.3, 0.4])),
        (lambda m, y, v: F.mse_loss(y[:, 0], v)[None], torch.tensor([0.1, 0.2, 0.3, 0.4])),
        (lambda m, y, v: F.softmax(y / v, -1), torch.tensor(0.07)),
        (lambda m, y, v: F.cross_entropy(y, torch.arange(4), weight=v)[None], torch.rand(4) + 1),
        (lambda m, y, v: torch.lerp(y, y.flip(0), v), torch.tensor(0.3)),
        (lambda m, y, v: torch.cat((y[0], v)), torch.rand(4)),
    ],
    ids=["mask", "all masked", "features", "targets", "temperature", "classes", "share", "cat"],
)
def test_a_vector_used_by_a_model_itself_meets_its_16_bits(
    way: Any, given: Tensor, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain = Using(way)
    model = cast_model(copy.deepcopy(plain), dtype)
    x = torch.randn(4, 4)
    ours, theirs = model(x, given), plain(x, given)
    assert ours.dtype == dtype
    assert (ours.float() - theirs).abs().max() <= 4 * torch.finfo(dtype).eps * theirs.abs().max()
    ours.float().sum().backward()
