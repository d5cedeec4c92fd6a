"""`make golden` sees a bit that moved, says which and when, and writes only what all agree on."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from mpcore_testing.golden.__main__ import main
from mpcore_testing.golden.cases import BACKENDS, CASES
from mpcore_testing.golden.comparison import Move, compare
from mpcore_testing.golden.recording import FOLDER, KINDS, load, recording_of, save
from mpcore_testing.golden.runs import RUNS
from mpcore_testing.golden.training import Training
from mpcore_testing.golden.values import numbers

NAME = "AdamW, mixed"


def snapshots(**changes):
    case = dataclasses.replace(CASES[NAME], **changes)
    return list(Training(case, "reference").run())


def one_ulp_up(tensor):
    flat = tensor.reshape(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf, dtype=tensor.dtype))


@pytest.mark.parametrize("kind", ["norm", "moments", "masters", "weights"])
def test_one_unit_in_the_last_place_of_one_value_is_seen_and_named(kind):
    steps = snapshots()
    before = recording_of(NAME, steps)
    assert compare(before, recording_of(NAME, snapshots())) == []
    one_ulp_up(getattr(steps[7], kind)[-1])
    one_ulp_up(getattr(steps[6], kind)[-1])
    count = {"norm": 1, "moments": 50, "masters": 25}
    detail = f"1 of {count[kind]} values, at most 1 ULP" if kind in count else ""
    assert compare(before, recording_of(NAME, steps)) == [Move(6, kind, detail)]


@pytest.mark.parametrize("kind", ["scale", "counters"])
def test_one_number_that_moved_is_seen_and_named(kind):
    steps = snapshots()
    before = recording_of(NAME, steps)
    numbers_then = getattr(steps[5], kind)
    then = " ".join(f"{number:g}" for number in numbers_then)
    numbers_then[0] += 1
    now = " ".join(f"{number:g}" for number in numbers_then)
    assert compare(before, recording_of(NAME, steps)) == [Move(5, kind, f"{then} -> {now}")]


def test_signs_of_zero_count_and_payloads_of_nan_do_not():
    steps = snapshots()
    master = steps[2].masters[0]
    master[:3] = torch.tensor([0.0, torch.nan, 1.0])
    before = recording_of(NAME, steps)
    master[:3] = torch.tensor([0x0, 0x7FC00001, 0x3F800000], dtype=torch.int32).view(torch.float32)
    assert compare(before, recording_of(NAME, steps)) == []
    master[0] = -0.0
    expected = [Move(2, "masters", "1 of 25 values, at most 0 ULP")]
    assert compare(before, recording_of(NAME, steps)) == expected
    master[:2] = torch.tensor([0.0, 1.0])
    expected = [Move(2, "masters", "1 of 25 values, 1 not finite before or now")]
    assert compare(before, recording_of(NAME, steps)) == expected


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"scale": CASES["static scale"].scale}, (0, "scale")),
        ({"rule": CASES["Adam L2, mixed"].rule}, (1, "moments")),
        ({"plan": (*CASES[NAME].plan[:2], *CASES[NAME].plan[1:7])}, (2, "norm")),
        ({"plan": CASES[NAME].plan[1:]}, (0, "moments")),
    ],
)
def test_a_run_that_is_another_one_moves_where_it_begins_to_differ(changes, first):
    moves = compare(load()[NAME], recording_of(NAME, snapshots(**changes)))
    assert (moves[0].step, moves[0].kind) == first
    assert [m.step for m in moves] == sorted(m.step for m in moves)
    assert ("steps" in {m.kind for m in moves}) == (len(changes.get("plan", range(8))) != 8)


def test_a_run_that_ends_early_is_only_good_if_a_part_was_asked_for():
    recorded, part = load()[NAME], recording_of(NAME, snapshots()[:3])
    assert compare(recorded, part, prefix=True) == []
    assert compare(recorded, part) == [Move(3, "steps", "8 recorded, 3 now")]
    assert compare(part, recorded, prefix=True) == [Move(3, "steps", "3 recorded, 8 now")]


def in_turn(runs):
    return [run.record() for run in runs]


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py"))
    return tmp_path


def edit(folder, change):
    """Applies `change` to the row of the case in the file of hashes."""
    path = folder / "hashes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["case"] == NAME:
            change(row)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_the_command_shows_what_is_the_same(copy, capsys):
    assert main([NAME, "--without", "triton"], copy, in_turn) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split("  ")[0] for line in lines if line.endswith("same")]
    assert shown == [NAME] * 3  # reference, compiled, and that one resumed
    assert lines[-1] == "3 runs, 0 of them not as recorded"


def test_the_command_shows_what_moved(copy, capsys):
    def change(row):
        row["weights"][3] = "0" * 12
        row["moments"][3] = "1" * 12

    edit(copy, change)
    assert main([f"{NAME}: compiled", "--without", "resumed"], copy, in_turn) == 1
    out = capsys.readouterr().out
    assert out.splitlines() == [
        f"{NAME}  compiled            MOVED",
        "    step 3: moments: other dtypes or shapes, the same bits",
        "    step 3: weights",
        "1 runs, 1 of them not as recorded",
    ]


def test_the_command_shows_what_is_new_and_what_is_gone(copy, capsys):
    edit(copy, lambda row: row.update(case="of old"))
    assert main([f"{NAME}: compiled", "--without", "resumed"], copy, in_turn) == 1
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.endswith("  new")
    assert last.startswith("of old: recorded, and no case any more")


def test_writing_gives_the_files_that_are_there(tmp_path, capsys):
    recorded = load()
    save(recorded.values(), tmp_path)
    for name in ("hashes.jsonl", "values.jsonl"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text()
    moved = [recorded[run.case] for run in RUNS]
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    assert main(["--write"], tmp_path, lambda runs: moved) == 0
    assert load(tmp_path) == recorded
    assert f"{len(CASES)} cases recorded" in capsys.readouterr().out


def test_nothing_is_written_if_backends_of_one_recording_disagree(copy, capsys):
    before = (copy / "hashes.jsonl").read_text()
    steps = snapshots()
    one_ulp_up(steps[4].masters[0])
    other = recording_of(NAME, steps)
    recorded = load()

    def run_all(runs):
        odd = [run for run in runs if run == (NAME, "compiled", False)]
        return [other if run in odd else recorded[run.case] for run in runs]

    assert main(["--write"], copy, run_all) == 1
    out = capsys.readouterr().out
    assert f"{NAME}: compiled has other bits" in out
    assert "step 4: masters: 1 of 25 values, at most 1 ULP" in out
    assert (copy / "hashes.jsonl").read_text() == before


@pytest.mark.parametrize("words", ["never", "--write SGD", "--write --without SGD"])
def test_what_the_command_cannot_do_is_refused(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(words.split(), tmp_path, in_turn)
    assert error.value.code == 2
    assert "words" in capsys.readouterr().err


def test_one_recording_serves_all_backends_but_for_rounded_norms():
    """Where the documentation says so; a case that lists fewer has a reason in its name."""
    fewer = [name for name, case in CASES.items() if case.backends != BACKENDS]
    assert all(name.startswith(("rounded norms", "long", "mpcore.GradScaler wi")) for name in fewer)
    assert {run.backend for run in RUNS} == {*BACKENDS, "none"}
    assert set(KINDS) == {field.name for field in dataclasses.fields(snapshots()[0])}


def test_numbers_are_fixed_and_short_ones_have_exact_squares():
    assert numbers((3,), 1, 2).tolist() == numbers((2, 3), 1, 2).reshape(-1)[:3].tolist()
    values = numbers((2000,), 7)
    assert values.abs().max() < 2
    assert values.unique().numel() == 1021, "repeated after a prime"
    short = numbers((1021,), 7, short=True)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(short.to(dtype).float(), short)
    squares = short.double().square() * 2**12
    assert torch.equal(squares, squares.round())
    assert 0 < squares.sum() < 2**24
