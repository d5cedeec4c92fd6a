"""Compiling C while Python runs: a source in, its functions out. Seconds, once per process."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from mpcore.errors import BackendError

COMPILERS = ("cc", "gcc", "clang")
# IEEE arithmetic as it is written: no contraction to fused multiply-adds. Traps and errno are what
# keeps loops from being vectorized; neither is looked at.
_FLAGS = (
    *("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-w"),
)
# for the processor that runs it, with all its vector instructions; older compilers for ARM know the
# second spelling only
_PROCESSOR = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",))


def find_compiler() -> str:
    """Returns the path of a C compiler.

    Raises:
        BackendError: There is none.
    """
    found = next((path for path in map(shutil.which, COMPILERS) if path is not None), None)
    if found is None:
        raise BackendError(
            f"backend: expected a C compiler for the compiled backend, found none of "
            f'{", ".join(COMPILERS)} on the path. Install one, or pass backend="cpu".'
        )
    return found


@cache
def load(source: str, definitions: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compiles a C source for this processor and loads it, once per process.

    Args:
        source: A complete file.
        definitions: Names of macros to define.

    Raises:
        BackendError: There is no compiler, it refused, or there is no folder to work in.

    Example:
        >>> load("int twice(int x) { return 2 * x; }").twice(21)
        42
    """
    compiler = find_compiler()
    try:
        with tempfile.TemporaryDirectory(prefix="mpcore-") as folder:
            return _compiled(compiler, source, definitions, Path(folder))
    except OSError as error:
        raise BackendError(
            "backend: expected a temporary folder that code can be written to and run from for the "
            f"compiled backend, got: {error}. Name another folder in TMPDIR, or pass "
            'backend="cpu".'
        ) from error


def _compiled(
    compiler: str, source: str, definitions: tuple[str, ...], folder: Path
) -> ctypes.CDLL:
    code, library = folder / "passes.c", folder / "passes.so"
    code.write_text(source, encoding="utf-8")
    macros = [f"-D{name}" for name in definitions]
    refusals = []
    for processor in _PROCESSOR:
        command = [compiler, *_FLAGS, *processor, *macros, str(code), "-o", str(library), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return ctypes.CDLL(str(library))
        refusals.append(done.stderr.strip())
    raise BackendError(
        f"backend: expected {compiler} to compile the passes of the compiled backend, got:\n"
        f'{refusals[-2]}\nInstall another compiler, or pass backend="cpu".'
    )
