"""`mpcore.compare`: the same loop under several policies."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import mpcore
import numpy as np
import pytest
import torch
from mpcore.comparison.result import mean_and_spread
from torch.nn import functional as F

from mpcore_testing.loops import batch, draw, loop, make
from mpcore_testing.pages import Elements, check_fetches_nothing, check_well_formed, pictures


def test_the_float32_run_is_plain_torch_bit_for_bit() -> None:
    result = mpcore.compare(loop(steps=20), ["bfloat16"], seeds=[3])
    torch.manual_seed(3)
    model, optimizer = make()
    losses = []
    for _ in range(20):
        inputs, targets = batch()
        loss = F.mse_loss(model(inputs), targets)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [loss for _, loss in result.of("float32")[0].log.losses] == losses
    assert result.of("float32")[0].metric == losses[-1]


def test_losses_lost_in_float16_are_found_and_a_loss_scale_brings_them_back() -> None:
    policies = ["float16", ("float16", mpcore.NoLossScale()), "bfloat16"]
    with (
        pytest.warns(UserWarning, match="^float16 gradients flush to 0"),
        pytest.warns(UserWarning, match="^all gradients were 0 in each of the last 32 steps"),
    ):
        result = mpcore.compare(loop(weight=2.0**-24), policies, seeds=5, margin=0.2)
    names = {label: found.name for label, found in result.agreements.items()}
    assert names == {
        "float16": "matches",
        "float16, NoLossScale()": "worse",
        "bfloat16": "matches",
    }
    lost = result.of("float16, NoLossScale()")[0].log.readings[-1]
    assert lost.zeros > 0.9


def test_every_policy_draws_the_same_and_every_seed_something_else() -> None:
    drawn: dict[tuple[str, int], Any] = {}

    def train(run: mpcore.TrainingRun) -> float:
        drawn[run.label, run.seed] = draw()
        model, optimizer = run.prepare(*make())
        optimizer.backward(model(batch()[0]).mean())
        optimizer.step()
        return 1.0

    told: list[tuple[str, int]] = []
    mpcore.compare(train, seeds=[7, 8], on_run=lambda label, seed: told.append((label, seed)))
    labels = ["float32", "float16", "bfloat16"]
    assert told == list(drawn) == [(label, seed) for seed in (7, 8) for label in labels]
    assert len({drawn[label, 7] for label in labels}) == 1
    assert len({drawn[label, 8] for label in labels}) == 1
    assert drawn["float32", 7] != drawn["float32", 8]


def test_the_callers_random_numbers_go_on_as_if_nothing_had_been() -> None:
    def seed_all() -> None:
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002 - what many loops still draw from
        torch.manual_seed(5)

    seed_all()
    expected = [draw(), draw()]
    seed_all()
    first = draw()
    mpcore.compare(loop(steps=2), ["bfloat16"], seeds=1)
    assert [first, draw()] == expected


def test_a_metric_that_is_not_finite_and_a_scale_at_its_floor_fail() -> None:
    def train(run: mpcore.TrainingRun) -> float:
        model, optimizer = run.prepare(*make())
        for _ in range(3):
            bad = torch.inf if run.label != "float32" else 1.0
            optimizer.backward(model(batch()[0]).mean() * bad)
            optimizer.step()
            optimizer.zero_grad()
        return 1.0

    strict = mpcore.DynamicLossScale(init=2.0, min_scale=1.0, at_min="raise")
    result = mpcore.compare(train, [("float16", strict)], seeds=1)
    assert "nan%" not in str(result)
    label = f"float16, {strict}"
    assert result.agreements[label].name == "fails"
    [outcome] = result.of(label)
    assert outcome.failure is not None
    assert "minimum" in outcome.failure
    assert any(outcome.failure in warning for warning in result.warnings)


def test_runs_that_do_not_begin_alike_are_told_of() -> None:
    begun = []

    def train(run: mpcore.TrainingRun) -> float:
        begun.append(run.label)
        torch.manual_seed(len(begun))  # not the seed of the run
        model, optimizer = run.prepare(*make())
        for _ in range(3 + (run.label == "float16")):
            inputs, targets = batch()
            optimizer.backward(F.mse_loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
        return 1.0

    result = mpcore.compare(train, seeds=1)
    assert len(result.warnings) == 2
    assert "4 steps, and 3 in FP32" in result.warnings[0]
    assert "the first loss is" in result.warnings[1]
    assert all(warning in str(result) for warning in result.warnings)


def test_loops_that_do_not_use_what_they_are_given_are_told() -> None:
    def without(run: mpcore.TrainingRun) -> float:
        return 1.0

    def twice(run: mpcore.TrainingRun) -> float:
        run.prepare(*make())
        run.prepare(*make())
        return 1.0

    def own_backward(run: mpcore.TrainingRun) -> None:
        model, optimizer = run.prepare(*make())
        model(batch()[0]).mean().backward()
        optimizer.step()

    with pytest.raises(mpcore.StageError, match="got none"):
        mpcore.compare(without)
    with pytest.raises(mpcore.StageError, match="second one"):
        mpcore.compare(twice)
    with pytest.raises(mpcore.StageError, match="got neither"):
        mpcore.compare(own_backward)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": []}, "policies: expected policies that differ"),
        ({"policies": ["float32"]}, "from float32"),
        ({"policies": ["float16", "float16"]}, "differ from each other"),
        ({"policies": ["half"]}, "expected one of float32"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": []}, "whole numbers"),
        ({"margin": 0}, "margin"),
        ({"every": 0}, "every"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_runs(
    options: dict[str, Any], message: str
) -> None:
    def train(run: mpcore.TrainingRun) -> None:
        raise AssertionError("it ran")

    with pytest.raises(mpcore.ArgumentError, match=message):
        mpcore.compare(train, **options)


def test_without_scipy_several_seeds_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(run: mpcore.TrainingRun) -> None:
        raise AssertionError("it ran")

    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr("mpcore.comparison.statistics.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs scipy.*mpcore\[report\]"):
        mpcore.compare(refuse)
    result = mpcore.compare(loop(steps=2), ["bfloat16"], seeds=1)
    assert "one seed" in str(result)


@pytest.mark.parametrize(
    "metric", [2.0, np.float32(2.0), torch.tensor(2.0, requires_grad=True), torch.tensor([2.0])]
)
def test_a_metric_is_any_number(metric: Any) -> None:
    def train(run: mpcore.TrainingRun) -> Any:
        loop(steps=1)(run)
        return metric

    assert mpcore.compare(train, seeds=1).outcomes[0].metric == 2.0


@pytest.mark.parametrize("policies", ["float16", [3], [("float16", "dynamic")]])
def test_policies_of_other_types_are_refused(policies: Any) -> None:
    with pytest.raises(mpcore.ArgumentTypeError):
        mpcore.compare(loop(), policies)
    with pytest.raises(mpcore.ArgumentTypeError, match="train: expected a function"):
        mpcore.compare(3)  # type: ignore[arg-type]


def test_runs_that_diverge_in_every_way_have_a_page(tmp_path: Path) -> None:
    def train(run: mpcore.TrainingRun) -> float:
        model, optimizer = run.prepare(*make())
        for step in range(25):
            bad = torch.nan if run.label != "bfloat16" and step > 10 else 1.0
            optimizer.backward(model(batch()[0]).square().mean() * bad)
            optimizer.step()
            optimizer.zero_grad()
        return torch.nan if run.label == "float32" else torch.inf

    result = mpcore.compare(train, seeds=2)
    assert {found.name for found in result.agreements.values()} == {"fails"}
    result.write_html(tmp_path / "page.html")
    check_well_formed((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_the_page_holds_table_verdicts_and_pictures(tmp_path: Path) -> None:
    result = mpcore.compare(loop(), ["float16", "bfloat16"], seeds=2, metric="error", margin=0.5)
    path = tmp_path / "compare.html"
    result.write_html(path)
    page = path.read_text(encoding="utf-8")
    check_fetches_nothing(page)
    check_well_formed(page)
    text = " ".join(" ".join(Elements(page).text).split())
    for found in result.agreements.values():
        assert found.text in text
    for row in result.table().rows:
        assert " ".join(row[:2]) in text
    # metric, losses, scale, difference, two of float16, lost updates, time, memory
    assert len(pictures(page)) == 9
    assert str(result).splitlines()[0] == "error (lower is better), seeds: 0, 1"


def test_means_show_as_many_digits_as_their_spread_allows() -> None:
    assert mean_and_spread([1.0, 3.0]) == "2.0 ± 1.4"
    assert mean_and_spread([0.12345, 0.12349]) == "0.123470 ± 0.000028"
    assert mean_and_spread([100.0, 300.0]) == "200 ± 141"
    assert mean_and_spread([1.0e-9, 1.2e-9]) == "1.1e-09 ± 1.4e-10"
    assert mean_and_spread([float("nan"), 1.0]) == "not finite"
