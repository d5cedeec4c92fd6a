"""`mpcore report`: logs of runs, heat maps, figures and the page of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mpcore
import numpy as np
import pytest
import torch
from mpcore.cli import app
from mpcore.monitoring.findings import Finding
from mpcore.monitoring.history import Course
from mpcore.monitoring.memory import Resident
from mpcore.monitoring.reading import Reading, summed_up
from mpcore.monitoring.run_log import RunLog
from mpcore.report.bars import Stack, memory_figure, time_figure
from mpcore.report.heat import digits_map, grouped, room_map
from mpcore.report.page import Section, Text, render_page
from mpcore.report.run_figures import (
    histogram_figure,
    scale_figure,
    style_of,
    what_if_figure,
)
from mpcore.report.run_page import render_runs
from mpcore.report.svg import corners, smooth, thinned
from torch import nn
from typer.testing import CliRunner

from mpcore_testing.pages import Elements, check_fetches_nothing, check_well_formed, pictures


def train(records: list[Any], steps: int = 30, scale: float = 2.0**30, fault: int = -1) -> None:
    """Trains a small float16 model whose scale has to come down, and notes what is told."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).half()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaling = mpcore.DynamicLossScale(init=scale, max_scale=2.0**40)
    optimizer = mpcore.MixedPrecisionOptimizer(adam, scaling)
    with mpcore.Monitor(optimizer, model, every=5, sinks=[records.append]):
        for step in range(steps):
            inputs = torch.randn(16, 8).half()
            if step == fault:
                inputs[0, 0] = torch.nan
            optimizer.backward(model(inputs).float().square().mean())
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture(scope="module")
def records() -> list[Any]:
    told: list[Any] = []
    train(told)
    return told


@pytest.fixture(scope="module")
def log(records: list[Any]) -> RunLog:
    return RunLog.of("run", records)


def finding(name: str, **changes: Any) -> Finding:
    plain = Finding(name, (2,), "float16", (), None, 1.0, 1.0, 5.0, 0.0, 0.02, (0,) * 39 + (1,))
    return replace(plain, **changes)


def reading(step: int, *findings: Finding) -> Reading:
    return Reading(
        *(step, 2.0**10, False, None, 1.0),
        lost_updates=None,
        saturated=0,
        findings=findings,
        **summed_up(findings),
    )


def test_a_log_has_every_step_in_order(log: RunLog) -> None:
    assert log.steps == list(range(30))
    assert len(log.scales) == len(log.losses) == 30
    assert log.resumed == ()
    skipped = [step for step, _ in log.skipped]
    assert skipped == list(range(len(skipped)))  # the search for the scale
    assert [report.step for report in log.overflows] == skipped
    assert len(log.seconds) == 29


def test_a_run_that_was_resumed_counts_on(records: list[Any]) -> None:
    log = RunLog.of("run", [*records, *records])
    assert log.steps == list(range(60))
    assert log.resumed == (30,)
    half = len(log.readings) // 2
    assert [r.step for r in log.readings[half:]] == [r.step + 30 for r in log.readings[:half]]
    assert log.overflows[-1].step == 30 + log.overflows[len(log.overflows) // 2 - 1].step


def test_a_run_that_was_killed_between_readings_counts_on_from_what_is_known() -> None:
    first, second = ([], [])
    train(first, steps=8)
    train(second, steps=5)
    killed = [record for record in first if not (isinstance(record, Course) and record.step == 5)]
    log = RunLog.of("run", [*killed, *second])
    assert log.steps == list(range(10))
    assert log.resumed == (5,)


def test_a_reading_after_a_restart_counts_from_there() -> None:
    def course(step: int, count: int) -> Course:
        return Course(step, (8.0,) * count, (False,) * count, *[(1.0,) * count] * 3)

    told = [course(0, 10), reading(99), course(0, 100), reading(199), course(100, 100)]
    log = RunLog.of("run", told)
    assert log.resumed == (10,)
    assert [r.step for r in log.readings] == [109, 209]
    assert log.steps == list(range(210))


def test_names_of_any_kind_have_a_page(log: RunLog) -> None:
    names = ["lr_$0.1 and $x^$", "_hidden", "a\udcff", "-->", "a\nb", "<script>"]
    page = render_runs([replace(log, name=name) for name in names], "\n".join(names))
    check_fetches_nothing(page)
    check_well_formed(page)
    page.encode()


@pytest.mark.parametrize("loss", [1e20, 1.7e308, math.inf, math.nan])
def test_one_huge_loss_is_forgotten_by_the_curve(loss: float) -> None:
    values = np.full(2000, 0.5)
    values[10] = loss
    assert smooth(values)[-1] == 0.5
    course = Course(
        *(0, (8.0,) * 2000, (False,) * 2000, (1.0,) * 2000, tuple(values), (0.1,) * 2000)
    )
    check_well_formed(render_runs([RunLog.of("run", [course])], "Huge"))


def test_the_page_of_a_run_is_complete_in_itself(log: RunLog) -> None:
    other = replace(log, name="other <run>")
    page = render_runs([log, other], "Two & more")
    check_fetches_nothing(page)
    check_well_formed(page)
    # losses, scales, exponents and other scales of each, lost updates, time, memory
    assert len(pictures(page)) == 9
    text = " ".join(" ".join(Elements(page).text).split())
    for report in log.overflows:
        assert f"run, step {report.step}" in text
    assert "Two & more" in text
    assert "other <run>" in text
    assert page == render_runs([log, other], "Two & more")


def test_a_run_of_which_little_is_known_has_a_page_as_well() -> None:
    course = Course(0, (1.0,), (False,), (1.0,), (None,), (None,))
    for log in (RunLog.of("run", [course]), RunLog.of("run", [reading(3, finding("w"))])):
        page = render_runs([log], "Little")
        check_well_formed(page)
        assert "run" in page


def test_skipped_steps_that_ask_for_something_come_first() -> None:
    told: list[Any] = []
    train(told, scale=2.0**12, fault=12)
    page = render_runs([RunLog.of("run", told)], "Fault")
    assert page.index('class="asks"') < page.index("Step 12")
    assert "1 forward" in page


def test_the_scale_figure_marks_each_skipped_step(log: RunLog) -> None:
    first = log.courses[0]
    only_one = replace(first, skipped=(True, *[False] * (len(first.skipped) - 1)))
    others = tuple(replace(c, skipped=(False,) * len(c.skipped)) for c in log.courses[1:])
    marks = scale_figure([log], ["run"]).count("<use")
    fewer = scale_figure([replace(log, courses=(only_one, *others))], ["run"]).count("<use")
    assert marks - fewer == len(log.skipped) - 1 > 5


def test_a_run_of_a_million_steps_has_a_page_of_a_usual_size() -> None:
    count = 1000
    courses = []
    for part in range(1000):
        losses = tuple(1 / (1 + part + i / count) for i in range(count))
        scales = tuple(2.0 ** (10 + part % 7) for _ in range(count))
        flags = tuple(i == 0 for i in range(count))
        courses.append(Course(part * count, scales, flags, (1.0,) * count, losses, (0.1,) * count))
    page = render_runs([RunLog.of("long", courses)], "Long")
    assert "1,000,000 steps" in page
    assert len(page) < 500_000


def test_twenty_runs_differ_in_colour_or_dashes() -> None:
    names = [f"run{i}" for i in range(20)]
    assert len({style_of(name, names) for name in names}) >= 18  # two dashes are solid twice


def test_thinning_keeps_means_and_corners_keep_every_change() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=10_000)
    steps, means = thinned(range(10_000), values)
    assert len(steps) == 1000
    assert steps[-1] == 9999
    np.testing.assert_allclose(means, values.reshape(1000, 10).mean(axis=1), rtol=0, atol=1e-12)
    levels = 2.0 ** rng.integers(0, 3, 500)
    places, kept = corners(range(500), levels)
    again = kept[np.searchsorted(places, np.arange(500), side="right") - 1]
    np.testing.assert_array_equal(again, levels)


def test_histogram_and_what_if_name_what_they_show(log: RunLog) -> None:
    first, last = log.readings[0], log.readings[-1]
    assert 'aria-label="Gradients by binary exponent' in histogram_figure(first, last)
    assert histogram_figure(first, last) != histogram_figure(last, last)
    assert what_if_figure(first) != what_if_figure(last)


@pytest.mark.parametrize(
    ("changes", "colour", "told"),
    [
        ({"headroom_bits": 0.5}, "#b2182b", "0.5 doublings"),
        ({"headroom_bits": 2.0}, "#ef8a62", "2.0 doublings"),
        ({"headroom_bits": 250.0}, "#67a9cf", "250.0 doublings"),
        ({"kinds": ("+inf",), "headroom_bits": 1.0}, "#1c2430", "+inf"),
        ({"headroom_bits": None}, "#f0f2f5", "nothing but zeros, or not looked at"),
    ],
)
def test_room_has_its_colour_and_its_words(changes: Any, colour: str, told: str) -> None:
    shown = room_map([reading(7, finding("w", **changes))])
    [(name, [cell])] = shown.rows
    assert (name, cell.colour, cell.told) == ("w", colour, f"step 7: {told}")


@pytest.mark.parametrize(
    ("share", "colour"),
    [(0.0, "#f7fbff"), (0.002, "#deebf7"), (0.3, "#fdae6b"), (1.0, "#d94801")],
)
def test_lost_digits_have_their_colour(share: float, colour: str) -> None:
    [(_, [cell])] = digits_map([reading(0, finding("w", subnormal=share))]).rows
    assert cell.colour == colour


def test_a_module_shows_its_worst_parameter() -> None:
    names = [f"layer{i}.{part}" for i in range(30) for part in ("weight", "bias")]
    findings = [finding(n, headroom_bits=0.5 if n == "layer3.bias" else 20.0) for n in names]
    shown = room_map([reading(0, *findings)])
    assert [name for name, _ in shown.rows] == [f"layer{i}" for i in range(30)]
    assert shown.rows[3][1][0].colour == "#b2182b"
    assert shown.rows[4][1][0].colour == "#67a9cf"


@pytest.mark.parametrize("count", [1, 2, 39, 40, 41, 79, 80, 81, 1000])
def test_rows_are_never_more_than_fit(count: int) -> None:
    groups = grouped([f"p{i}" for i in range(count)], 40)
    assert len(groups) == count
    assert len(set(groups.values())) <= 40


def test_columns_are_spread_over_the_run_with_both_ends() -> None:
    shown = room_map([reading(step, finding("w")) for step in range(0, 1000, 10)])
    [(_, cells)] = shown.rows
    steps = [int(cell.told.split(":")[0].removeprefix("step ")) for cell in cells]
    assert len(steps) == len(shown.columns) == 20
    assert (steps[0], steps[-1]) == (0, 990)
    assert steps == sorted(set(steps))


def test_bars_say_their_values() -> None:
    stacks = [Stack.of("a", Resident(10, 20, 20, 40, 80), activations=10)]
    assert 'aria-label="Bytes per parameter: a 17.0"' in memory_figure(stacks, "memory")
    assert "b 1.5e+03" in time_figure([("b", [1.5]), ("c", [math.pi])], "time")


def test_text_cannot_break_the_page() -> None:
    page = render_page("<b>", "</p>", (Section("&", (Text("<script>1</script>"),)),), "</footer>")
    check_fetches_nothing(page)
    check_well_formed(page)


def run_command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_writes_a_page_of_files(tmp_path: Path, records: list[Any]) -> None:
    paths = [tmp_path / "a" / "run.jsonl", tmp_path / "b" / "run.jsonl"]
    for path in paths:
        path.parent.mkdir()
        sink = mpcore.JsonLines(path)
        for record in records:
            sink(record)
    output = tmp_path / "page.html"
    result = run_command(*paths, "--output", output, "--title", "Mine")
    assert result.exit_code == 0, result.output
    page = output.read_text(encoding="utf-8")
    assert "<h1>Mine</h1>" in page
    assert ">a/run<" in page
    assert ">b/run<" in page
    twice = run_command(paths[0], paths[0], "--output", output)
    assert twice.output.startswith("mpcore: runs: expected each file once")


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    for arguments in ([empty], [tmp_path / "none.jsonl"], [empty, "--output", tmp_path]):
        result = run_command(*arguments)
        assert result.exit_code == 2
        assert result.output.startswith("mpcore: ")
        assert "Traceback" not in result.output


def test_json_says_what_the_runs_come_to(tmp_path: Path, records: list[Any]) -> None:
    sink = mpcore.JsonLines(tmp_path / "run.jsonl")
    for record in records:
        sink(record)
    output = tmp_path / "page.html"
    result = run_command(tmp_path / "run.jsonl", "--output", output, "--json")
    assert result.exit_code == 0, result.output
    (run,) = json.loads(result.stdout)["runs"]
    log = RunLog.read(tmp_path / "run.jsonl")
    assert run["run"] == "run"
    assert (run["steps"], run["skipped_steps"]) == (len(log.steps), len(log.skipped))
    assert run["last_loss"] == log.losses[-1][1]
    assert run["last_loss_scale"] == log.scales[-1]
    assert run["headroom_bits"] == log.readings[-1].headroom_bits
    assert output.is_file()
