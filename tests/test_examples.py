"""The scripts of examples/, under torchrun on the CPU, as their first lines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from mpcore_testing.ranks import OF_RANKS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = OF_RANKS


def torchrun(example: str, *arguments: object, count: int = 2) -> str:
    """What a script prints."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), str(ROOT / "examples" / example)]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ddp() -> None:
    printed = torchrun("ddp.py")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+), norm", printed)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 50
    assert "ranks agree; loss scale 65536" in printed


def test_fsdp2_resumes_with_the_same_bits(tmp_path: Path) -> None:
    whole, resumed = (torchrun("fsdp2.py", tmp_path) for _ in "12")
    assert whole.startswith("from step 0: ")
    assert resumed == whole.replace("from step 0", "from step 10")
    assert float(re.search(r"loss ([\d.]+)", whole)[1]) < 2.5  # nats; 4.2 is a guess


def test_two_dimensions() -> None:
    printed = torchrun("two_dimensions.py", count=4)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+), norm", printed)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 20
    assert "path fused" in printed
