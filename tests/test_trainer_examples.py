"""The scripts of examples/ that trainers run, as their first lines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.trainers


def printed(example: str, *arguments: object) -> str:
    """What a script prints."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(ROOT / "examples" / example), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_trainer_resumes_with_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    whole = printed("trainer.py", tmp_path / "whole", 60)
    printed("trainer.py", tmp_path / "parts", 30)
    parts = printed("trainer.py", tmp_path / "parts", 60)
    lines = [re.search(r"^step 60.*\nloss scale.*", text, re.M) for text in (whole, parts)]
    assert lines[0] is not None
    assert lines[1] is not None
    assert lines[0][0] == lines[1][0]
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", whole)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] / 1.5
    assert (tmp_path / "whole" / "float32" / "model.safetensors").is_file()


def test_lightning_trainer(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    line = printed("lightning_trainer.py", tmp_path)
    match = re.search(r"^300 steps, of which (\d+) skipped; loss ([\d.]+)$", line, re.M)
    assert match is not None, line
    assert int(match[1]) < 10
    assert float(match[2]) < 0.05
