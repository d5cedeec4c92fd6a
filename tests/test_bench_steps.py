"""`mpcore bench`: what is stepped over, which rows count as right, what is counted."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from mpcore.bench import (
    check,
    contenders,
    counting,
    experiment,
    problem,
    report,
    rows,
    shapes,
)
from mpcore.bench.compact_rows import compact_rows
from mpcore.bench.experiment import BenchSettings, Outcome, run_bench
from mpcore.bench.shapes import ParameterList
from mpcore.bench.timing import Times
from mpcore.errors import ArgumentError

from mpcore_testing.benchmarks import one_measurement  # noqa: F401 - for all tests here

CPU = torch.device("cpu")
# remainders of vectors, of chunks, and a scalar
MIXED = ParameterList("mixed", ((7, 13), (1,), (4099,), (64, 65), ()))


class Silent:
    def begin(self, label, total):
        def advance(done, note):
            assert 0 < done <= total

        return advance


def run(listed=MIXED, **options):
    return run_bench(BenchSettings((listed,), rounds=2, threads=1, **options), Silent())


def test_gpt2_list_has_the_published_number_of_parameters():
    listed = shapes.gpt2()
    assert listed.count == 124_439_808
    assert listed.shapes[0] == (50257, 768)
    assert max(map(len, listed.shapes)) == 2


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("small", [2000 * 4096]),
        ("10M", [10_000_000]),
        ("1.5K", [1500]),
        ("17", [17]),
        ("sweep", [1e6, 1e7, 5e7, 1e8, 2e8]),
        ("watch", [8192000, 128000]),
    ],
)
def test_words_name_parameter_lists(text, counts):
    assert [listed.count for listed in shapes.parse(text)] == counts


@pytest.mark.parametrize("text", ["", "gpt3", "0", "-1", "1.0005K", "10m", "1e6"])
def test_words_that_name_no_list_are_refused(text):
    with pytest.raises(ArgumentError, match="shapes: expected gpt2, small, sweep"):
        shapes.parse(text)


def test_oracle_is_adamw_of_torch_in_float64():
    given = problem.make_problem(MIXED, CPU)
    params = [torch.nn.Parameter(weight.double()) for weight in given.weights]
    optimizer = torch.optim.AdamW(params, **problem.ADAMW)
    norms = []
    for step in range(len(problem.FACTORS)):
        for param in params:
            param.grad = torch.empty_like(param)
        given.fill([param.grad for param in params], step, scaled=False)
        norms.append(torch.nn.utils.clip_grad_norm_(params, problem.MAX_NORM).item())
        optimizer.step()
    for param, expected in zip(params, problem.oracle(given), strict=True):
        torch.testing.assert_close(param.detach(), expected, rtol=1e-13, atol=1e-15)
    # clipped, clipped more, not clipped
    assert norms[1] > norms[0] > problem.MAX_NORM > norms[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_dtype_is_given_the_same_numbers(dtype):
    given = problem.make_problem(MIXED, CPU)
    for step in range(len(problem.FACTORS)):
        narrow = [torch.empty(shape, dtype=dtype) for shape in MIXED.shapes]
        exact = [torch.empty(shape, dtype=torch.float64) for shape in MIXED.shapes]
        given.fill(narrow, step, scaled=True)
        given.fill(exact, step, scaled=True)
        assert all(torch.equal(a.double(), b) for a, b in zip(narrow, exact, strict=True))
    assert all(torch.equal(w.to(dtype).double(), w.double()) for w in given.weights)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_own_rows_are_right_and_are_timed(dtype):
    result = run(dtype=dtype, backend="reference")
    own = {row.key for row in rows.own_rows(torch.float16, "auto", CPU)}
    for outcome in result.outcomes:
        if outcome.row.key in own:
            assert outcome.reason is None
            assert 0 < outcome.error < 1
            assert len(outcome.times.seconds) == 2
            assert outcome.launches is None
    baseline = next(o for o in result.outcomes if o.row.key == rows.BASELINE)
    assert result.ratio(baseline) == 1.0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_compact_states_are_right_and_hold_what_they_say(dtype):
    keys = [row.key for row in compact_rows(torch.float16, "auto", CPU)]
    listed = ParameterList("rows", ((30, 256), (20, 512)))
    outcomes = run(listed, dtype=dtype, backend="reference", rows=tuple(keys)).outcomes
    held = {outcome.row.key: outcome.resident for outcome in outcomes}
    assert all(outcome.reason is None and 0 < outcome.error < 1 for outcome in outcomes)
    expected = {"split": 14, "split-bf16": 10, "split-int8": 8, "none-bf16": 8, "none-int8": 6}
    for key, size in expected.items():
        scales = 2 * 4 / 256 if "int8" in key else 0
        assert held[key] == pytest.approx(size + scales, abs=0.01)  # keys and step counts


def test_rows_of_compact_states_run_where_they_are_named():
    keys = {outcome.row.key for outcome in run(backend="reference").outcomes}
    assert not keys & {row.key for row in compact_rows(torch.float16, "auto", CPU)}


@pytest.mark.parametrize("key", ["split-bf16", "split-int8", "none-bf16", "none-int8"])
def test_moments_that_lose_their_digits_are_not_right(key, monkeypatch):
    class Forgetful(contenders.Mpcore):
        def step(self):
            super().step()
            for param in self.params:
                state = self._optimizer.float32_state(param)
                moments = {name: torch.zeros_like(v) for name, v in state.items() if "exp" in name}
                self._optimizer.set_float32_state(param, moments)

    monkeypatch.setattr("mpcore.bench.compact_rows.Mpcore", Forgetful)
    _, outcome = run(backend="reference", rows=(key,)).outcomes
    assert outcome.reason.startswith("wrong weights:")


class Unclipped(contenders.TorchAmp):
    def step(self):
        self._scaler.step(self._optimizer)
        self._scaler.update()


class ScaledGradients(contenders.TorchAmp):
    def step(self):
        torch.nn.utils.clip_grad_norm_(self.params, problem.MAX_NORM)
        self._optimizer.step()


class NoDecay(contenders.TorchAmp):
    def __init__(self, given, fused):
        super().__init__(given, fused)
        self._optimizer.param_groups[0]["weight_decay"] = 0.0


class OneWeightOff(contenders.TorchAmp):
    def weight(self, index):
        found = super().weight(index).clone()
        if found.dim() == 1:
            found[-1] += 4e-6
        return found


class NotANumber(contenders.TorchAmp):
    def weight(self, index):
        return super().weight(index) * (torch.nan if index == 0 else 1.0)


class Raises(contenders.TorchAmp):
    def step(self):
        raise ZeroDivisionError("no\nluck")


def with_row(monkeypatch, kind):
    make = experiment.own_rows

    def replaced(dtype, backend, device):
        return tuple(
            replace(row, make=lambda given: kind(given, False)) if row.key == "amp-foreach" else row
            for row in make(dtype, backend, device)
        )

    monkeypatch.setattr(experiment, "own_rows", replaced)
    return run(rows=("amp-foreach",))


@pytest.mark.parametrize("kind", [Unclipped, ScaledGradients, NoDecay, OneWeightOff, NotANumber])
def test_wrong_row_is_not_timed_and_says_why(kind, monkeypatch):
    result = with_row(monkeypatch, kind)
    baseline, wrong = result.outcomes
    assert wrong.reason.startswith("wrong weights:")
    assert not wrong.error <= 1
    assert wrong.times is None
    assert wrong.resident is None
    assert baseline.times is not None
    table = report.time_table(result, MIXED)
    assert [row[0] for row in table.rows] == [baseline.row.label]
    assert any("wrong weights" in note for note in table.notes)


def test_row_that_raises_does_not_stop_the_others(monkeypatch):
    baseline, broken = with_row(monkeypatch, Raises).outcomes
    assert broken.reason == "failed: ZeroDivisionError: no luck"
    assert broken.times is None
    assert baseline.times is not None


def test_distance_is_the_largest_or_the_mean():
    expected = torch.tensor([1.0, -2.0], dtype=torch.float64)
    weight = torch.tensor([1.5, -2.0])
    for largest, value in ((True, 1.0), (False, 0.5)):
        bound = rows.Bound(0.5, 0.0, largest, "an example")
        assert check.distance(weight, expected, bound) == value


def test_bytes_are_those_counted_by_hand():
    result = run(ParameterList("even", ((1000,), (24, 1000))), backend="reference")
    found = {o.row.key: o for o in result.outcomes}
    # two tensors, each with a step count of 4 bytes
    steps = 2 * 4 / 25_000
    assert found["fused"].resident == 2 + 2 + 4 + 8 + steps
    assert found["amp-fused"].resident == 4 + 4 + 8 + steps
    assert found["masters-loop"].resident == 2 + 2 + 4 + 4 + 8 + steps
    # a foreach step holds one temporary of every parameter
    assert 4 <= found["amp-foreach"].peak_extra < 4.1
    assert found["amp-fused"].peak_extra < 0.01
    assert found["amp-foreach"].host_reads == 1
    assert found["amp-fused"].host_reads == 0
    assert found["masters-loop"].host_reads == 1


def test_a_fused_step_allocates_less_than_a_hundredth_of_the_parameters():
    listed = ParameterList("even", ((1_000_000,), (1000, 500)))  # 3 MB in float16
    fused, *_ = run(listed, rows=("fused",), backend="compiled").outcomes
    assert fused.reason is None
    assert fused.peak_extra < 0.01 * 2  # per parameter of two bytes


@pytest.mark.parametrize(
    ("key", "total"),
    [("fused", 30), ("general", 42), ("amp-fused", 48), ("amp-foreach", 100), ("masters-loop", 60)],
)
def test_stated_traffic_adds_up(key, total):
    row = next(row for row in rows.own_rows(torch.float16, "auto", CPU) if row.key == key)
    assert row.traffic.total == total
    assert sum(float(word) for word in str(row.traffic).split() if word.isdigit()) in (
        total,
        total + 8,  # "in 8 passes"
    )


def test_scratch_that_stays_is_counted_as_kept():
    scratch = []

    def call():
        scratch.append(torch.empty(500) + torch.empty(500))

    assert counting.allocated(call, CPU) == counting.Allocated(peak=6000, kept=2000)


def test_host_reads_leave_out_state_that_lives_on_the_host():
    step, value = torch.ones(()), torch.ones(())
    with counting.HostReads(CPU, [step]) as reads:
        assert step.item() + value.item() + bool(value) == 3
    assert reads.count == 2
    assert counting.compiled_host_reads(lambda: (step.item(), value.item())) == 2


def test_quartiles_are_those_of_numpy():
    seconds = tuple(np.random.default_rng(0).random(10).tolist())
    expected = np.quantile(seconds, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(Times(seconds).quartiles, expected, rtol=1e-15)
    assert Times((2.0,)).quartiles == (2.0, 2.0, 2.0)


def test_csv_has_a_line_for_every_row_and_says_on_what_it_was_measured():
    result = run(rows=("fused", "apex"), backend="reference")
    lines = list(csv.DictReader(io.StringIO(report.to_csv(result))))
    assert [line["row"] for line in lines] == ["fused", "amp-fused", "apex"]
    assert tuple(lines[0]) == report.COLUMNS
    fused, _, apex = lines
    assert fused["torch"] == torch.__version__
    assert fused["parameters"] == str(MIXED.count)
    assert fused["cpu"]
    assert fused["date"].endswith("+00:00")
    assert float(fused["median_s"]) > 0
    ratio = float(fused["median_s"]) / float(lines[1]["median_s"])
    assert float(fused["ratio_to_amp_fused"]) == pytest.approx(ratio)
    assert fused["reason"] == ""
    assert apex["reason"] == "not installed"
    assert apex["median_s"] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"dtype": "float32"}, "dtype: expected one of float16, bfloat16"),
        ({"lists": ()}, "shapes: expected at least one"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        BenchSettings(**{"lists": (MIXED,), **options})


def test_more_than_fits_into_memory_is_refused_before_it_is_made():
    huge = ParameterList("huge", ((10**13,),))
    with pytest.raises(ArgumentError, match="Name fewer rows"):
        run(huge)


def test_rates_need_times():
    outcome = Outcome(MIXED, rows.own_rows(torch.float16, "auto", CPU)[0])
    assert report.achieved(outcome) is None
    timed = replace(outcome, times=Times((0.5,)))
    assert report.achieved(timed) == 30 * MIXED.count / 0.5
