"""One part of tests/gpu/run.py, which starts this in a process of its own.

python tests/gpu/part.py NAME MODE FILE SECONDS
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support")]

from mpcore_testing.gpu_run.parts import SIZES  # noqa: E402
from mpcore_testing.gpu_run.record import Recorder  # noqa: E402


def main(name: str, mode: str, file: str, seconds: str) -> None:
    """Runs the part; its exceptions end the process, and its file stays."""
    record = Recorder(Path(file), float(seconds))
    rehearses = mode == "rehearsal"
    if rehearses:
        # read when a kernel is decorated
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    # a home that cannot be written to must not end a run
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "mpcore-triton"))
    import torch

    from mpcore_testing.gpu_run.setting import Setting

    check_source()
    device = torch.device("cpu") if rehearses else torch.device("cuda", 0)
    if rehearses:
        torch.set_num_threads(1)
        # the interpreter computes with NumPy, which warns on inf - inf and the like
        warnings.filterwarnings("ignore", category=RuntimeWarning)
    part = importlib.import_module(f"mpcore_testing.gpu_run.{name}")
    part.run(record, Setting(device, SIZES[mode]))
    record.save()


def check_source() -> None:
    """Raises unless the code that runs is this copy's."""
    import mpcore

    found = Path(mpcore.__file__).resolve()
    if ROOT not in found.parents:
        raise RuntimeError(f"expected mpcore from {ROOT}, got {found}")


if __name__ == "__main__":
    main(*sys.argv[1:])
