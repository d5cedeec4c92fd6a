"""`mpcore reproduce`: what is counted, against independent counts, and that effects show."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpcore.cli import app
from mpcore.demo.digits import DigitsSettings
from mpcore.demo.reproduce import loss_scaling, lost_gradients, lost_updates, master_weights
from mpcore.loss_scale import DynamicLossScale, NoLossScale, StaticLossScale
from typer.testing import CliRunner

from mpcore_testing.lengths import short_and_long

TINY = DigitsSettings(seeds=(0, 1), epochs=1)


def nothing(label: str, epochs: int) -> Any:
    return lambda done: None


def is_lost(weight: Fraction, exponent: int, bits: int) -> bool:
    """Whether weight * 2^exponent, added to a weight in [1, 2) of so many bits, changes nothing."""
    unit = Fraction(1, 2 ** (bits - 1))
    update = weight * Fraction(2) ** exponent
    if update != unit / 2:
        return update < unit / 2
    return (weight / unit) % 2 == 0  # a tie goes to the even one


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
@pytest.mark.parametrize("exponent", lost_updates.SHARES)
def test_lost_updates_are_those_of_exact_arithmetic(
    dtype: torch.dtype, bits: int, exponent: int
) -> None:
    count = 3000
    drawn = 1 + torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    weights = [Fraction(float(w)) for w in drawn.to(dtype)]
    # 2.0 is the first number with a larger unit
    inside = [w for w in weights if w < 2]
    expected = sum(is_lost(w, exponent, bits) for w in inside)
    expected += sum(is_lost(w / 2, exponent, bits) for w in weights if w == 2)
    assert lost_updates.lost_share(dtype, exponent, 4, count) == expected / count


@pytest.mark.parametrize("steps", short_and_long(1000, lost_updates.STEPS))
def test_the_law_has_its_limits_and_masters_their_sum(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(lost_updates, "STEPS", steps)
    found = lost_updates.measure()
    for dtype, first_lost in ((torch.float16, -12), (torch.bfloat16, -9)):
        shares = found.lost[dtype]
        assert all(shares[k] == 1.0 for k in shares if k <= first_lost)
        assert shares[first_lost + 1] < 0.02
        assert all(shares[k] == 0.0 for k in shares if k > first_lost + 1)
    assert found.sums["float16"] == found.sums["bfloat16"] == 1.0
    # as many roundings of a float32 of at most 2, at most 2^-24 * 2 each
    total = 1 + steps * 1e-4
    assert found.sums["float32"] == pytest.approx(total, abs=steps * 2.0**-23)
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        assert found.sums[f"{name} with a master"] == float(torch.tensor(total).to(dtype))


def test_gradients_are_counted_as_numpy_rounds_them() -> None:
    rng = np.random.default_rng(0)
    values = (2.0 ** rng.uniform(-45, 2, 20_000)).astype(np.float32)
    values[::7] = 0
    values[1::7] = 2.0**-25  # a tie, which becomes 0
    values[2::7] *= -1
    found = lost_gradients.count(torch.from_numpy(values))
    total = len(values)
    assert found.zero == (values == 0).sum() / total
    for scale, share in found.lost.items():
        half = (values.astype(np.float64) * scale).astype(np.float16)
        assert share == ((half == 0) & (values != 0)).sum() / total
    half = np.abs(values).astype(np.float16)
    # what rounds up to 2^-14 keeps its digits: counted as subnormal before rounding
    below = (np.abs(values) < 2.0**-14) & (half != 0)
    assert found.subnormal == below.sum() / total
    assert found.zero + found.lost[1.0] + found.subnormal + found.normal == pytest.approx(1.0)
    exponents = [math.floor(math.log2(abs(float(v)))) for v in values if v != 0]
    clamped = np.clip(exponents, lost_gradients.LOWEST, lost_gradients.HIGHEST)
    counts = np.bincount(clamped - lost_gradients.LOWEST, minlength=len(found.histogram))
    np.testing.assert_allclose(found.histogram, counts / total, rtol=1e-12, atol=0)


def test_lost_gradients_are_those_of_autograd_on_each_layer() -> None:
    settings = replace(lost_gradients.SETTINGS, seeds=(3,), epochs=1)
    counted = lost_gradients.measure(settings, nothing)[0]
    images = lost_gradients.Images.load()
    model = lost_gradients.SideBySideMLP((64, 128, 64, 10), (3,))
    kept: list[torch.Tensor] = []
    for start in range(0, 5 * 256, 256):
        x = images.train[start : start + 256]
        outputs = []
        for i, (weight, bias) in enumerate(zip(model.weights, model.biases, strict=True)):
            x = x @ weight[0] + bias[0]
            outputs.append(x)
            if i < 2:
                x = x.relu()
        loss = torch.nn.functional.cross_entropy(x, images.labels[start : start + 256])
        kept += [g.flatten() for g in torch.autograd.grad(loss, outputs)]
    gradients = torch.cat(kept).double().abs()
    assert len(images.train) // 256 == 5
    # products may be added in another order: an element or two may change sides
    few = 3 / len(gradients)
    assert counted.zero == pytest.approx(float((gradients == 0).double().mean()), abs=few)
    normal = float((gradients >= 2.0**-14).double().mean())
    assert counted.normal == pytest.approx(normal, abs=few)


@pytest.mark.parametrize("run", ["scaling", "masters", "gradients"])
def test_equal_settings_give_equal_numbers(run: str) -> None:
    if run == "scaling":
        results = [
            loss_scaling.train(torch.float16, DynamicLossScale(), 1e-4, TINY, lambda done: None)
            for _ in range(2)
        ]
        assert results[0] == results[1]
    elif run == "masters":
        tables = [
            master_weights.table(master_weights.measure(TINY, nothing), TINY) for _ in range(2)
        ]
        assert tables[0] == tables[1]
    else:
        settings = replace(lost_gradients.SETTINGS, seeds=(1,), epochs=1)
        found = [lost_gradients.measure(settings, nothing) for _ in range(2)]
        assert found[0] == found[1]


def test_without_a_scale_small_losses_teach_nothing_and_with_one_as_much_as_in_fp32() -> None:
    settings = DigitsSettings(seeds=(0, 1), epochs=4)

    def accuracy(dtype: torch.dtype, scale: Any, weight: float) -> float:
        run = loss_scaling.train(dtype, scale, weight, settings, lambda done: None)
        return sum(run.accuracies) / len(run.accuracies)

    fp32 = accuracy(torch.float32, NoLossScale(), 1e-6)
    assert fp32 > 0.9
    assert accuracy(torch.float16, StaticLossScale(1.0), 1e-6) < 0.2
    assert accuracy(torch.float16, DynamicLossScale(), 1e-6) > fp32 - 0.02
    assert accuracy(torch.bfloat16, NoLossScale(), 1e-6) > fp32 - 0.02


def run_command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


@pytest.fixture
def short_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of ten thousand steps are judged above: commands make some of ten."""
    monkeypatch.setattr(lost_updates, "STEPS", 10)


@pytest.mark.usefixtures("short_sums")
def test_the_command_prints_tables_and_writes_markdown(tmp_path: Path) -> None:
    output = tmp_path / "tables.md"
    result = run_command("--quick", "--seeds", 1, "--output", output)
    assert result.exit_code == 0, result.output
    text = output.read_text(encoding="utf-8")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(titles) == 6
    for title in titles:
        assert " ".join(title[3:].split()) in " ".join(result.output.split())
    assert "| FP16 + masters + scaling |" in text


@pytest.mark.usefixtures("short_sums")
def test_the_command_runs_what_it_is_asked_for() -> None:
    result = run_command("lost-updates")
    assert result.exit_code == 0
    assert "Updates that rounding loses" in result.output
    assert "small losses" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["other"], "names: expected some of loss-scaling, master-weights"),
        (["--seeds", 0], "seeds"),
        (["--threads", 0], "threads"),
        (["--output", "none/tables.md"], "output: expected a file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[Any], message: str) -> None:
    result = run_command(*arguments)
    assert result.exit_code == 2
    assert result.output.startswith(f"mpcore: {message}")
    assert result.output.count("\n") == 1
