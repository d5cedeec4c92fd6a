"""A training process that is killed at any moment goes on from a whole checkpoint, same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpcore.checkpoint import file as checkpoint_file

from mpcore_testing.bits import same_bits

STEPS = 400
PROGRAM = """
import os, pathlib, sys, time
import torch, torch._dynamo, mpcore
from mpcore import checkpoint_file

# a fresh process for each run, all of them forks of this one, which imports torch once
for line in sys.stdin:
    if not os.fork():
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
pause, name = line.rstrip().split(" ", 1)
path, steps, pause = pathlib.Path(name), int(sys.argv[1]), float(pause)
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
print(os.getpid(), first, flush=True)
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


class Training:
    """Runs of the program on one checkpoint, one after the other."""

    def __init__(self, server: subprocess.Popen[str], path: Path) -> None:
        self.server, self.path = server, path

    def run(self, pause: float, seconds: float | None = None) -> tuple[int, int]:
        """Trains, for so many seconds at most; returns the first step and the exit status."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(pause, self.path, file=self.server.stdin, flush=True)
        process, first = map(int, self.server.stdout.readline().split())
        if seconds is not None:
            time.sleep(seconds)
            os.kill(process, signal.SIGKILL)
        return first, int(self.server.stdout.readline())


def killed(training: Training, kills: int) -> list[int]:
    """Trains with as many kills; returns the steps that the processes began from."""
    choose, began = random.Random(0), []
    for _ in range(kills):
        first, status = training.run(0.02, choose.random() * 0.3)
        assert status == -signal.SIGKILL
        began.append(first)
    first, status = training.run(0.0)
    assert status == 0
    return [*began, first]


@pytest.mark.parametrize(
    "kills", [2, pytest.param(50, marks=pytest.mark.exhaustive)], ids=["a few", "many"]
)
def test_a_process_that_is_killed_goes_on_with_the_same_bits(tmp_path: Path, kills: int) -> None:
    command = [sys.executable, "-c", PROGRAM, str(STEPS)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as server:
        began = killed(Training(server, tmp_path / "killed.pt"), kills)
        assert Training(server, tmp_path / "straight.pt").run(0.0) == (0, 0)
        server.communicate(timeout=300)
    assert server.returncode == 0
    assert began == sorted(began)
    assert began[-1] > 0
    one, other = (checkpoint_file.load(tmp_path / f"{name}.pt") for name in ("killed", "straight"))
    assert one["step"] == other["step"] == STEPS
    assert one["optimizer"]["mpcore"]["loss_scale"]["skipped_steps"] > 0
    assert same_bits(one, other)
