"""One command for a GPU: compares bits, takes steps, times the optimizer and whole training steps.

    python tests/gpu/run.py --out DIR [--quick]

Needs Python 3.10, torch and Triton; no network, no installation, no build. Writes DIR/gpu.json and
DIR/gpu.md and keeps both up to date after every row. Where there is no GPU it rehearses on the CPU.

The exit status is 0 if every part came to its end and no row failed, 1 if one did, 2 if nothing
could be run. Bits that differ and rows that time did not suffice for are results, not failures.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# this copy of the code, whatever is installed
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support")]

from mpcore_testing.gpu_run.page import MARK  # noqa: E402
from mpcore_testing.gpu_run.parts import LIMITS, PARTS  # noqa: E402
from mpcore_testing.gpu_run.runner import Run, stamped  # noqa: E402

KNOWN = ", ".join(part.name for part in PARTS)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="under 2 minutes, not 8")
    mode.add_argument("--rehearse", action="store_true", help="on the CPU, even beside a GPU")
    parser.add_argument("--parts", help=f"some of {KNOWN}, separated by commas")
    return parser.parse_args()


def main() -> int:
    """Runs the parts; returns the exit status."""
    chosen = arguments()
    if importlib.util.find_spec("torch") is None:
        stamped(
            f"{sys.executable} has no torch. Name a Python that has it: "
            "make gpu PYTHON=.venv/bin/python (`make test` makes that one)."
        )
        return 2
    wanted = (chosen.parts or KNOWN.replace(" ", "")).split(",")
    unknown = sorted(set(wanted) - {part.name for part in PARTS})
    if unknown:
        stamped(f"--parts: expected some of {KNOWN}, got {', '.join(unknown)}.")
        return 2
    mode = "quick" if chosen.quick else "full"
    if chosen.rehearse:
        mode = "rehearsal"
    elif not gpu_is_there():
        mode = "rehearsal"
        stamped("no CUDA or ROCm device that PyTorch can use: a rehearsal on the CPU instead")

    def command(name: str, path: Path, seconds: float) -> list[str]:
        child = ROOT / "tests" / "gpu" / "part.py"
        return [sys.executable, "-u", str(child), name, mode, str(path), f"{seconds:.1f}"]

    page = ROOT / "docs" / "gpu.md"
    template = page.read_text(encoding="utf-8") if page.is_file() else f"# On a GPU\n\n{MARK}\n"
    run = Run(chosen.out.resolve(), mode, command, template, LIMITS[mode], stamped)
    run.run([part for part in PARTS if part.name in wanted])
    told = "complete" if run.complete else "with failures"
    stamped(f"{told}: {chosen.out / 'gpu.md'}, {chosen.out / 'gpu.json'}")
    return 0 if run.complete else 1


def gpu_is_there() -> bool:
    """Whether PyTorch can use a GPU; makes no context on it."""
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
