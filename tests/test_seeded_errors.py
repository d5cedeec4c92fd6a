"""Tests that the seeded errors of `tests/mutation` are about the sources as they are now."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "mutation"
LISTS = sorted({path.stem for path in FOLDER.glob("*.py")} - {"mutant", "run"})


@pytest.mark.parametrize("name", LISTS)
def test_each_can_be_put_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)  # scripts, which import each other
    lists = [v for v in runpy.run_path(f"{FOLDER / name}.py").values() if isinstance(v, list)]
    mutants: list[Any] = [mutant for each in lists for mutant in each]
    assert mutants
    for mutant in mutants:
        found = (ROOT / mutant.path).read_text().count(mutant.text)
        assert found == 1, f"{mutant.path}, {mutant.name}: {mutant.text!r} is there {found} times"
        for test in mutant.checks:
            assert test.startswith("audit ") or (ROOT / test).exists(), test
