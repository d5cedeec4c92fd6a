"""A training process that is killed at any moment goes on from a whole checkpoint, same bits."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpcore import checkpoint_file

from mpcore_testing.bits import same_bits

STEPS = 400
PROGRAM = """
import pathlib, sys, time
import torch, mpcore
from mpcore import checkpoint_file

path, steps, pause = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
optimizer = mpcore.MixedPrecisionOptimizer(
    torch.optim.AdamW(model.named_parameters(), lr=1e-2),
    mpcore.DynamicLossScale(2.0**14, growth_interval=20),
)
model = mpcore.cast_model(model, torch.float16, optimizer)
first = 0
if path.exists():
    saved = checkpoint_file.load(path)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    first = saved["step"]
print("from", first, flush=True)
for step in range(first, steps):
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    optimizer.backward(model(inputs.half()).float().square().mean())
    optimizer.step()
    optimizer.zero_grad()
    time.sleep(pause)
    if step % 3 == 2 or step == steps - 1:
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        checkpoint_file.save(saved, path)
"""


def start(path: Path, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(path), str(STEPS), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def killed(path: Path, kills: int) -> list[int]:
    """Trains with as many kills; returns the steps that the processes began from."""
    choose, began = random.Random(0), []
    for kill in range(kills + 1):
        process = start(path, 0.0 if kill == kills else 0.02)
        assert process.stdout is not None
        began.append(int(process.stdout.readline().split()[1]))
        if kill < kills:
            time.sleep(choose.random() * 0.3)
            process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=300) == (0 if kill == kills else -signal.SIGKILL)
        process.stdout.close()
    return began


@pytest.mark.parametrize(
    "kills", [2, pytest.param(50, marks=pytest.mark.exhaustive)], ids=["a few", "many"]
)
def test_a_process_that_is_killed_goes_on_with_the_same_bits(tmp_path: Path, kills: int) -> None:
    began = killed(tmp_path / "killed.pt", kills)
    assert began == sorted(began)
    assert began[-1] > 0
    with start(tmp_path / "straight.pt", 0.0) as process:
        process.communicate(timeout=300)
    assert process.returncode == 0
    one, other = (checkpoint_file.load(tmp_path / f"{name}.pt") for name in ("killed", "straight"))
    assert one["step"] == other["step"] == STEPS
    assert one["optimizer"]["mpcore"]["loss_scale"]["skipped_steps"] > 0
    assert same_bits(one, other)
