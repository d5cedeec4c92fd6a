"""The demo's tables and its HTML report."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch
from mpcore.demo import experiment, tables
from mpcore.demo.experiment import make_settings, run_demo
from mpcore.demo.figures import scale_figure
from mpcore.demo.regimes import FP16_HEADROOM, FP32, GPT_REGIMES
from mpcore.demo.report import render_report
from mpcore.errors import ArgumentError, ArgumentTypeError
from mpcore.loss_scale import DynamicLossScale
from mpcore.report.page import with_powers
from mpcore.report.svg import smooth

from mpcore_testing.pages import check_fetches_nothing, check_well_formed, pictures


def without_times(run):
    """A run but for what it took, as text: norms in its log may be NaN."""
    run = replace(run, seconds=0.0)
    if getattr(run, "log", None) is not None:
        courses = tuple(replace(course, seconds=()) for course in run.log.courses)
        run = replace(run, log=replace(run.log, courses=courses))
    return repr(run)


class Recorder:
    """A progress display that remembers."""

    def __init__(self):
        self.runs = []

    def begin(self, label, total):
        run = [label, total, 0]
        self.runs.append(run)

        def advance(done, note):
            run[2] = done

        return advance


@pytest.fixture(scope="module")
def recorder():
    return Recorder()


@pytest.fixture(scope="module")
def result(recorder):
    settings = make_settings(quick=True, seeds=2, steps=4)
    # 2^60 overflows FP16, so that there are skipped steps to show
    scale = DynamicLossScale(init=2.0**60, max_scale=2.0**60, backoff_factor=2.0**-40)
    gpt = replace(settings.gpt, scale=scale)
    digits = replace(settings.digits, epochs=1)
    return run_demo(replace(settings, gpt=gpt, digits=digits), recorder)


@pytest.fixture(scope="module")
def page(result):
    return render_report(result)


def test_report_fetches_nothing_and_is_well_formed(page):
    check_fetches_nothing(page)
    check_well_formed(page)


def test_report_shows_every_cell_of_every_table(page, result):
    for table in (
        tables.gpt_table(result),
        tables.digits_table(result),
        tables.bytes_table(result),
    ):
        for row in table.rows:
            for cell in row[1:]:
                assert f"<td>{with_powers(cell)}</td>" in page
            assert f'<th scope="row">{row[0]}</th>' in page


def test_report_holds_figures_with_descriptions(page):
    found = pictures(page)
    # losses, difference, scales, exponents, other scales, lost updates, memory, time
    assert len(found) == 8
    assert all(picture["role"] == "img" and picture["aria-label"] for picture in found)
    assert 'class="heat"' in page


def test_report_lists_the_skipped_steps_of_the_first_seed_with_their_verdicts(page, result):
    logs = [run.log for run in (result.of(regime)[0] for regime in GPT_REGIMES) if run.log]
    reports = [(log.name, report) for log in logs for report in log.overflows]
    assert reports
    assert "<h2>Skipped steps</h2>" in page
    for name, report in reports:
        assert f"{with_powers(name)}, step {report.step:,}" in page
        assert str(with_powers(str(report.verdict))) in page
    calm = [replace(run, log=run.log and replace(run.log, overflows=())) for run in result.runs]
    assert "<h2>Skipped steps</h2>" not in render_report(replace(result, runs=tuple(calm)))


def test_figure_is_the_same_every_time_and_marks_each_skipped_step(result):
    scaled = [regime for regime in GPT_REGIMES if regime.scaled]
    assert all(result.of(regime)[0].skipped for regime in scaled)
    skipped = sum(len(result.of(regime)[0].skipped) for regime in scaled)
    first = scale_figure(result)
    assert first == scale_figure(result)
    # a marker is drawn by a <use> element within clipped data; the legend's is not clipped
    unmarked = [replace(run, skipped=()) if run.regime.scaled else run for run in result.runs]
    fewer = scale_figure(replace(result, runs=tuple(unmarked)))
    assert first.count("<use") - fewer.count("<use") == skipped


def test_gpt_table_has_one_row_per_regime_with_what_was_measured(result):
    table = tables.gpt_table(result)
    assert [row[0] for row in table.rows] == [regime.label for regime in GPT_REGIMES]
    assert all(len(row) == len(table.header) for row in table.rows)
    for regime, row in zip(GPT_REGIMES, table.rows, strict=True):
        losses = [run.validation_loss for run in result.of(regime)]
        assert row[1].startswith(f"{np.mean(losses):.4f} ({min(losses):.4f} to")
        if regime is FP16_HEADROOM:  # starts at 2^28 in these four steps, on its own
            assert row[4] not in ("2^20", "1")
        else:
            assert row[3] == ("1" if regime.scaled else "0")
            assert row[4] == ("2^20" if regime.scaled else "1")
        shares = [run.subnormal for run in result.of(regime)]
        if regime.weights == torch.float32:
            assert (shares, row[5]) == ([None, None], "")
        else:
            assert float(row[5][:-1]) == pytest.approx(100 * np.mean(shares), abs=0.051)
        if regime != FP32:
            baseline = np.mean([run.validation_loss for run in result.of(FP32)])
            # a percentage with two decimals
            assert abs(float(row[2][:-1]) - (np.mean(losses) / baseline - 1) * 100) < 0.0051


def test_gpt_table_states_the_loss_weight_and_what_became_of_eps(result):
    notes = " ".join(tables.gpt_table(result).notes)
    assert "multiplied by 2^-10" in notes
    assert "eps of 1e-8 by the same" in notes


def test_demo_runs_every_regime_with_every_seed_and_reports_progress(result, recorder):
    assert len(result.runs) == 2 * len(GPT_REGIMES)
    assert {run.seed for run in result.runs} == {0, 1}
    assert len(recorder.runs) == len(result.runs) + len(result.digits)
    assert all(total == done for _, total, done in recorder.runs)


def test_demo_in_two_processes_gives_the_numbers_of_one_and_the_same_progress(result, recorder):
    heard = Recorder()
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # of this process; those of the others are the settings'
    try:
        again = run_demo(replace(result.settings, processes=2), heard)
    finally:
        torch.set_num_threads(before)
    assert [*map(without_times, again.runs)] == [*map(without_times, result.runs)]
    assert [*map(without_times, again.digits)] == [*map(without_times, result.digits)]
    assert heard.runs == recorder.runs
    assert multiprocessing.active_children() == []


def test_demo_runs_on_the_threads_it_was_told_and_gives_the_others_back(monkeypatch):
    for regimes in ("GPT_REGIMES", "DIGITS_REGIMES"):
        monkeypatch.setattr(experiment, regimes, (FP32,))
    before = torch.get_num_threads()
    counts = set()

    class Watcher(Recorder):
        def begin(self, label, total):
            return lambda done, note: counts.add(torch.get_num_threads())

    settings = make_settings(quick=True, steps=1, threads=2)
    run_demo(replace(settings, digits=replace(settings.digits, epochs=1)), Watcher())
    assert counts == {2}
    assert torch.get_num_threads() == before


def test_smoothing_averages_over_the_steps_before():
    values = np.random.default_rng(0).normal(size=100)
    expected = [values[max(0, i - 4) : i + 1].mean() for i in range(100)]
    np.testing.assert_allclose(smooth(values), expected, rtol=0, atol=1e-12)  # sums of 100 values


def test_smoothing_leaves_out_what_is_not_finite():
    values = np.ones(60)
    values[30:32] = np.nan, np.inf
    smoothed = smooth(values)
    assert np.isnan(smoothed[30])
    assert np.isinf(smoothed[31])
    np.testing.assert_allclose(np.delete(smoothed, [30, 31]), 1.0, rtol=0, atol=1e-12)


def test_powers_become_superscripts_and_markup_is_escaped():
    assert with_powers("2^16 & 2^-10 < 3e-5") == (
        "2<sup>16</sup> &amp; 2<sup>&minus;10</sup> &lt; 3e&#8209;5"
    )


def test_settings_of_the_command_line_change_what_they_name():
    default, quick = make_settings(processes=1), make_settings(quick=True)
    assert default == experiment.DemoSettings()
    assert quick.gpt.steps < default.gpt.steps
    settings = make_settings(seed=3, seeds=2, steps=7)
    assert settings.seeds == (3, 4)
    assert settings.digits.seeds == (3, 4, 5)
    assert settings.gpt.steps == 7
    assert settings.gpt.warmup <= 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds"),
        ({"steps": 0}, "steps"),
        ({"threads": 0}, "threads"),
        ({"processes": 0}, "processes"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_reject_counts_below_one(options, message):
    with pytest.raises(ArgumentError, match=f"^{message}: expected"):
        make_settings(**options)


def test_settings_reject_a_count_that_is_no_integer():
    with pytest.raises(ArgumentTypeError, match="steps: expected an integer"):
        make_settings(steps=1.5)
