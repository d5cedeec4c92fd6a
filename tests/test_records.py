"""What a monitor tells its sinks, and what is read back from a file of it."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import mpcore
import pytest
import torch
from mpcore.monitoring.history import Course
from mpcore.monitoring.records import read_records

from mpcore_testing.engines import Engine
from mpcore_testing.monitored import make, overflow, set_gradients


def test_json_lines_hold_every_record_and_no_name_that_json_lacks(
    engine: Engine, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    params, optimizer = make(engine, mpcore.DynamicLossScale(2.0**10))
    mpcore.Monitor(optimizer, every=2, sinks=[mpcore.JsonLines(path)])
    set_gradients(params, optimizer, 1)
    optimizer.step()
    overflow(params, optimizer)
    set_gradients(params, optimizer, 2)
    optimizer.step()
    set_gradients(params, optimizer, 3)
    optimizer.step()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    lines = path.read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    kinds = ["reading", "overflow", "course", "reading", "course"]
    assert [record["kind"] for record in records] == kinds
    assert [record["step"] for record in records] == [1, 1, 0, 3, 2]
    assert records[0]["grad_norm"] == "inf"
    assert records[1]["verdict"]["name"] == "search"
    assert len(records[3]["histogram"]) == 40


def test_tensorboard_gets_numbers_and_text(engine: Engine) -> None:
    written: list[Any] = []

    class Writer:
        def add_scalar(self, tag: str, value: Any, step: int) -> None:
            written.append((tag, value, step))

        def add_text(self, tag: str, text: str, step: int) -> None:
            written.append((tag, text, step))

    params, optimizer = make(engine, mpcore.DynamicLossScale(2.0**10))
    mpcore.Monitor(optimizer, every=1, sinks=[mpcore.TensorBoard(Writer())])
    set_gradients(params, optimizer, 0)
    optimizer.step()
    overflow(params, optimizer)
    tags = [tag for tag, _, step in written if step == 0]
    assert {"mpcore/loss_scale", "mpcore/grad_norm", "mpcore/zeros", "mpcore/subnormal"} <= set(
        tags
    )
    assert ("mpcore/loss_scale", 2.0**10, 0) in written
    assert any(tag == "mpcore/overflow" and "Step 1 was skipped" in str(t) for tag, t, _ in written)


def source_of(module: str) -> ast.Module:
    """Parses a module of an installed package that need not be importable."""
    package, *rest = module.split(".")
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    return ast.parse(Path(found.origin).parent.joinpath(*rest).with_suffix(".py").read_text())


def methods_of(module: str, name: str) -> dict[str, list[str]]:
    """Returns the parameters of the methods of a class."""
    kinds = [node for node in ast.walk(source_of(module)) if isinstance(node, ast.ClassDef)]
    (kind,) = [node for node in kinds if node.name == name]
    methods = [node for node in kind.body if isinstance(node, ast.FunctionDef)]
    return {one.name: [a.arg for a in one.args.args] for one in methods}


def test_tensorboard_is_called_as_torchs_writer_wants_it() -> None:
    """Read from its source: importing it takes the package tensorboard."""
    writer = methods_of("torch.utils.tensorboard.writer", "SummaryWriter")
    expected = methods_of("mpcore.monitoring.sinks", "_Writer")
    assert set(expected) == {"add_scalar", "add_text"}
    for name, parameters in expected.items():
        assert writer[name][: len(parameters)] == parameters
    calls = [
        node
        for node in ast.walk(source_of("mpcore.monitoring.sinks"))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self._writer.")
    ]
    assert calls
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        assert len(call.args) == 3  # tag, value and step
        parameters = writer[call.func.attr]
        assert {keyword.arg for keyword in call.keywords} <= set(parameters)
        tag, _, step = call.args
        assert ast.unparse(tag)[0] in "'f" or ast.unparse(tag) == "tag"
        assert "step" in ast.unparse(step)


def watched(engine: Engine, *sinks: Any, steps: int = 7, every: int = 3) -> Any:
    """A monitor of some steps, of which the fourth overflows."""
    params, optimizer = make(engine, mpcore.DynamicLossScale(2.0**10))
    monitor = mpcore.Monitor(optimizer, every=every, sinks=sinks)
    for step in range(steps):
        if step == 3:
            overflow(params, optimizer)
        else:
            set_gradients(params, optimizer, step)
            optimizer.step()
            optimizer.zero_grad()
    return monitor


def test_courses_hold_every_step_once(engine: Engine) -> None:
    records: list[Any] = []
    watched(engine, records.append).close()
    courses = [record for record in records if isinstance(record, Course)]
    assert [course.step for course in courses] == [0, 3, 6]
    assert sum((course.skipped for course in courses), ()) == (*[False] * 3, True, *[False] * 3)
    scales = sum((course.loss_scale for course in courses), ())
    assert scales == (*[2.0**10] * 4, *[2.0**9] * 3)
    losses = sum((course.loss for course in courses), ())
    assert losses == (1.0,) * 7
    seconds = sum((course.seconds for course in courses), ())
    assert seconds[0] is None
    assert all(0 < taken < 60 for taken in seconds[1:])
    readings = {r.step: r for r in records if isinstance(r, mpcore.monitoring.reading.Reading)}
    norms = sum((course.grad_norm for course in courses), ())
    assert norms[2] == readings[2].grad_norm
    assert norms[3] == torch.inf


def test_closing_twice_and_without_a_step_tells_nothing_more(engine: Engine) -> None:
    records: list[Any] = []
    _, optimizer = make(engine)
    with mpcore.Monitor(optimizer, sinks=[records.append]) as monitor:
        pass
    monitor.close()
    assert records == []
    monitor = watched(engine, records.append, steps=2)
    monitor.close()
    monitor.close()
    assert [type(record) for record in records] == [Course]
    assert monitor.course().step == 0


def test_a_window_shorter_than_a_reading_loses_no_step(engine: Engine) -> None:
    records: list[Any] = []
    params, optimizer = make(engine)
    monitor = mpcore.Monitor(optimizer, every=5, window=2, sinks=[records.append])
    for step in range(5):
        set_gradients(params, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
    assert len(records[-1].loss_scale) == 5
    assert len(monitor.course().loss_scale) == 2


def test_rare_readings_keep_no_more_than_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpcore.monitoring.monitor._LONGEST", 3)
    monkeypatch.setattr("mpcore.monitoring.monitor.SKIPS", 1)
    records: list[Any] = []
    params, optimizer = make(Engine("cpu", "fused"))
    with mpcore.Monitor(optimizer, every=10**9, window=2, sinks=[records.append]):
        for step in range(5):
            set_gradients(params, optimizer, step)
            optimizer.step()
            optimizer.zero_grad()
    [course] = records
    assert (course.step, len(course.loss_scale), len(course.seconds)) == (2, 3, 3)


def test_a_reading_counts_the_bytes_of_the_optimizer(engine: Engine) -> None:
    monitor = watched(engine, every=1)
    memory = monitor.reading.memory
    # three parameters of 12: two in 16 bits, one in 32
    assert memory.parameters == 36
    assert (memory.weights, memory.masters, memory.moments) == (96, 96, 288)
    assert memory.gradients == 96
    assert memory.total == 96 * 3 + 288


def test_what_was_written_is_what_is_read(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    records: list[Any] = []
    watched(engine, records.append, mpcore.JsonLines(path)).close()
    assert {type(record).__name__ for record in records} == {"Reading", "OverflowReport", "Course"}
    assert read_records(path) == records


def test_passes_and_names_that_look_like_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.ones(2).half()) for _ in range(2)]
    named = list(zip(("inf", "nan"), weights, strict=True))
    optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD(named, lr=0.1))
    records: list[Any] = []
    path = tmp_path / "run.jsonl"
    sinks = [records.append, mpcore.JsonLines(path)]
    with mpcore.Monitor(optimizer, every=1, sinks=sinks):
        for value in (1.0, -torch.inf):
            optimizer.scale(torch.ones(()))
            for weight in weights:
                weight.grad = torch.full_like(weight, value)
            optimizer.accumulate()
        optimizer.step()
    assert records[1].passes[0].parameters == ("inf", "nan")
    again = read_records(path)
    assert again[1:] == records[1:]
    assert str(again[1]) == str(records[1])


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    watched(Engine("cpu", "fused"), mpcore.JsonLines(path)).close()
    whole = read_records(path)
    text = path.read_text()
    for cut in (1, 10, 100):
        path.write_text(text[:-cut])
        assert read_records(path) == whole[:-1]


def test_a_run_that_goes_on_in_the_file_of_one_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    first = Course(0, (8.0,), (False,), (1.0,), (None,), (None,))
    mpcore.JsonLines(path)(first)
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    sink = mpcore.JsonLines(path)
    sink(first)
    sink(first)
    assert read_records(path) == [first] * 3


@pytest.mark.parametrize(
    "line", ["{", "[]", "1", '{"kind": "other"}', '{"step": 1}', '{"kind": "course", "steps": 1}']
)
def test_what_is_no_record_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(f"\n{line}\n".lstrip("\n"))
    with pytest.raises(mpcore.ArgumentError, match="line 1: expected a record"):
        read_records(path)
    with pytest.raises(mpcore.ArgumentError, match="expected a file"):
        read_records(tmp_path / "none.jsonl")
