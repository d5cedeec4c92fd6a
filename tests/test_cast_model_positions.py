"""Codes of positions and times in a cast model: what is computed from them has all digits."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import mpcore
import pytest
import torch
from mpcore import cast_model, cast_report
from torch import Tensor, nn

HALF = [torch.float16, torch.bfloat16]
WIDTH = 32
INVERSE = 1.0 / 10000 ** (torch.arange(0, WIDTH, 2).float() / WIDTH)


class Code(nn.Module):
    """Has frequencies under a name of one's choice; hands on angles or their cosines and sines."""

    def __init__(self, name: str, values: Tensor, angles: bool) -> None:
        super().__init__()
        self.name, self.angles = name, angles
        self.register_buffer(name, values, persistent=False)

    def forward(self, x: Tensor) -> Any:
        at = torch.arange(x.shape[-2], device=x.device).float()
        phases = torch.einsum("i,j->ij", at, getattr(self, self.name).flatten())
        phases = torch.cat((phases, phases), -1)
        return phases if self.angles else (phases.cos(), phases.sin())


class Head(nn.Module):
    """Causal attention over rotated queries and keys, which casts nothing by itself."""

    def __init__(self, code: nn.Module | None, values: Tensor | None = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.code = code
        if values is not None:
            self.register_buffer("wub", values)

    def forward(self, x: Tensor) -> Tensor:
        if self.code is None:  # all of it in here
            phases = torch.outer(torch.arange(x.shape[-2]), self.wub.squeeze())
            found: Any = torch.cat((phases, phases), -1)
        else:
            found = self.code(x)
        cos, sin = found if isinstance(found, tuple) else (found.cos(), found.sin())
        q, k, v = self.qkv(x * self.scale).chunk(3, -1)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        return (q @ k.transpose(-1, -2) / WIDTH**0.5).softmax(-1) @ v  # type: ignore[no-any-return]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = WIDTH // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


VALUES = {
    "falling": INVERSE,
    "rising": INVERSE.flip(0),
    "in a row": INVERSE[None],
    "in a column": INVERSE[:, None],
    "with a scaled tail": torch.where(INVERSE < 0.01, INVERSE / 8, INVERSE),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("where", ["angles", "cosines", "in the head"])
def test_rotary_attention_with_its_code_under_any_name(
    where: str, values: str, dtype: torch.dtype
) -> None:
    """2,048 positions: rounded frequencies turn the last ones by half a circle and more."""
    torch.manual_seed(0)
    table = VALUES[values]
    inside = where == "in the head"
    plain = Head(
        None if inside else Code("xyz", table, where == "angles"), table if inside else None
    )
    model = cast_model(copy.deepcopy(plain), dtype)
    x = torch.randn(1, 1, 2048, WIDTH)
    with torch.no_grad():
        ours, theirs = model(x), plain(x)
    assert ours.dtype == dtype
    # errors of a position are some 0.1 of the largest value
    assert (ours.float() - theirs).abs().max() <= 6 * torch.finfo(dtype).eps * theirs.abs().max()
    small = model(x[..., :64, :])
    assert small.dtype == dtype
    small.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["inv_freq", "original_inv_freq", "freqs", "timescales"])
def test_a_code_of_a_known_name_is_kept_whatever_its_values(name: str, dtype: torch.dtype) -> None:
    table = torch.tensor([0.3, 0.1, 0.7, 0.1])
    code = Code(name, table.clone(), True)
    model = cast_model(nn.ModuleList([code, nn.Linear(2, 2)]), dtype)
    assert torch.equal(getattr(code, name), table)
    assert "a position code by its name" in str(cast_report(model))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_slopes_of_a_bias_by_distance_are_kept(dtype: torch.dtype) -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.register_buffer("foo", 2 ** (-8 * torch.arange(1, 13) / 12))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            at = torch.arange(x.shape[-2])
            bias = -self.foo[:, None, None] * (at[:, None] - at).abs()
            return ((q @ k.transpose(-1, -2))[:, None] + bias).softmax(-1) @ v[:, None]

    torch.manual_seed(0)
    plain = Biased()
    model = cast_model(copy.deepcopy(plain), dtype)
    assert model.foo.dtype == torch.float32
    x = torch.randn(2, 512, 8)
    assert (model(x).float() - plain(x)).abs().max() <= 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_schedule_of_noise_is_read_exactly(dtype: torch.dtype) -> None:
    class Schedule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 8)
            self.register_buffer("kept_signal", (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0))

        def forward(self, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
            level = self.kept_signal[step][:, None]
            ratio = level.log() - (1 - level).log()
            return self.net(x * level.sqrt()), ratio

    model = Schedule()
    expected = model.kept_signal.clone()
    cast_model(model, dtype)
    x, step = torch.randn(3, 8), torch.tensor([0, 500, 999])
    result, ratio = model(x, step)
    assert result.dtype == dtype
    level = expected[step][:, None]
    assert torch.equal(ratio, level.log() - (1 - level).log())


@pytest.mark.parametrize(
    "values",
    [
        INVERSE.repeat(2),
        INVERSE.repeat_interleave(2),
        -INVERSE,
        -INVERSE.flip(0).repeat(2),
        80 * INVERSE[::5],
        INVERSE.double(),
    ],
)
def test_codes_of_other_makes_are_known_by_their_values(values: Tensor) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("wibble", values.clone())
    cast_model(model, torch.bfloat16)
    assert torch.equal(model.wibble, values)
    assert model.wibble.dtype == values.dtype
    assert "a position code by its values" in str(cast_report(model))


def test_tables_that_are_no_codes_are_cast() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]))
    model.register_buffer("grid", torch.linspace(0, 1, 8))
    model.register_buffer("window", torch.hann_window(16))
    model.register_buffer("odds", torch.tensor([0.1, 2.3, 0.4, 1.7, 0.2]))
    model.register_buffer("signs", torch.tensor([-0.1, -0.3, 1.3, 7.7]))
    model.register_buffer("few", torch.tensor([0.01, 0.1, 1.1]))
    model.register_buffer("ramp", torch.linspace(0.1, 1, 9))
    model.register_buffer("waves", torch.randn(4, 4))
    cast_model(model, torch.float16)
    assert {b.dtype for b in model.buffers()} == {torch.float16}


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_code_that_its_pass_puts_in_anew_goes_on_giving_way(dtype: torch.dtype) -> None:
    class Dynamic(Code):
        def forward(self, x: Tensor) -> Any:
            self.xyz = self.xyz / (1 + x.shape[-2] / 64)
            return super().forward(x)

    torch.manual_seed(0)
    model = cast_model(Head(Dynamic("xyz", INVERSE.clone(), False)), dtype)
    for length in (8, 16):
        assert model(torch.randn(1, length, WIDTH)).dtype == dtype
    assert type(model.code.xyz) is Tensor


def test_a_code_that_nobody_knows_is_found_with_a_batch_or_named() -> None:
    """Angles of a table, neither a line of numbers nor of a known name."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)
            self.register_buffer("qux", torch.outer(torch.arange(2048.0), INVERSE))

        def forward(self, x: Tensor) -> Tensor:
            turn = torch.cat((self.qux.cos(), self.qux.sin()), -1)[: x.shape[-2]]
            return self.linear(x * turn)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    plain = Table()
    x = torch.randn(2048, 32)
    errors = {}
    for way in ("neither", "batch", "named"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            options: dict[str, Any] = {"batch": {"batch": x}, "named": {"keep_fp32": "qux"}}.get(
                way, {}
            )
            model = cast_model(copy.deepcopy(plain), torch.bfloat16, **options)
        assert [("keep_fp32=['qux']" in str(each.message)) for each in told] == [True] * (
            not options
        )
        errors[way] = (model(x).float() - plain(x)).abs().max().item()
    assert errors["neither"] > 0.5
    assert max(errors["batch"], errors["named"]) < 0.03


def test_a_policy_keeps_buffers_by_name_too() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("qux", torch.tensor([0.1, 0.3, 0.2]))
    model = mpcore.Policy("bfloat16").apply(model, overrides={"qux": "float32"})
    assert model.qux.dtype == torch.float32
