"""How the C of the compiled backend becomes a library: when a wheel is built, or at run time.

Standard library only: `hatch_build.py` runs this file by itself, where there may be no torch.

A wheel holds one library per level of its processor family. Its name says the level and which
source it was made from: one that was made from an older source is as good as none.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

HERE = Path(__file__).parent
SOURCE, HEADER = HERE / "_passes.c", HERE / "_steps.h"
#: All that a library is made from.
SOURCES = (
    SOURCE,
    *(HERE / f"_{name}.h" for name in ("numbers", "adopt", "sample", "stores", "loop", "tiles")),
    HEADER,
)
#: Where the libraries of a wheel are.
BUILT = HERE / "_built"
COMPILERS = ("cc", "gcc", "clang")

# IEEE arithmetic as it is written: no contraction to fused multiply-adds. Traps and errno are what
# keeps loops from being vectorized; neither is looked at.
FLAGS = (
    *("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-w"),
)
#: For the processor that runs it, with all its vector instructions; older compilers for ARM know
#: the last spelling only.
NATIVE = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",))
# names of levels by what torch calls a processor's abilities, best first
_X86 = {
    "AVX512": ("x86-64-v4", ("-march=x86-64-v4", "-mprefer-vector-width=512")),
    "AVX2": ("x86-64-v3", ("-march=x86-64-v3",)),
    "": ("x86-64", ("-march=x86-64",)),
}


def find_compilers() -> list[str]:
    """Returns the paths of C compilers, best first."""
    return [path for path in map(shutil.which, COMPILERS) if path is not None]


def identity() -> str:
    """Returns what is another string for another source."""
    digest = hashlib.sha256()
    for path in (*SOURCES, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def build(compiler: str, source: Path, library: Path, processor: Iterable[str]) -> str | None:
    """Compiles a file into a library; returns what the compiler said if it refused, else None."""
    command = [compiler, *FLAGS, *processor, str(source), "-o", str(library), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip()


def levels(machine: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Returns name and flags of each level of a processor family, by torch's name, best first.

    Example:
        >>> levels("aarch64")
        {'': ('aarch64', ())}
    """
    return _X86 if machine in ("x86_64", "AMD64") else {"": (machine, ())}


def find_built(capability: str) -> Path | None:
    """Returns the best library that came with the package and suits this processor, or None.

    Args:
        capability: What `torch.backends.cpu.get_cpu_capability()` calls its abilities.
    """
    known = levels(platform.machine())
    try:
        suffix = f"-{identity()}.so"
    except OSError:  # the package lies in an archive, or without its sources
        return None
    if capability not in known:
        capability = ""
    for name, _ in list(known.values())[list(known).index(capability) :]:
        path = BUILT / f"passes-{name}{suffix}"
        if path.is_file():
            return path
    return None


def build_levels(folder: Path) -> list[Path]:
    """Builds a library for each level into an empty folder; returns them.

    Levels that the compiler does not know are left out, all of them if no compiler works.
    """
    known = list(levels(platform.machine()).values())
    libraries = [folder / f"passes-{name}-{identity()}.so" for name, _ in known]
    flags = [processor for _, processor in known]
    for compiler in find_compilers():
        with ThreadPoolExecutor() as pool:
            attempts = pool.map(build, repeat(compiler), repeat(SOURCE), libraries, flags)
            refusals = list(attempts)
        built = [path for path, why in zip(libraries, refusals, strict=True) if why is None]
        if built:
            return built
    return []


def build_in_place() -> list[Path]:
    """Builds the libraries into `BUILT`; replaces older ones unless there is nothing new."""
    with tempfile.TemporaryDirectory(prefix="mpcore-") as folder:
        built = build_levels(Path(folder))
        if not built:
            return []
        BUILT.mkdir(exist_ok=True)
        for old in BUILT.glob("passes-*.so"):
            old.unlink()
        return [Path(shutil.copy(path, BUILT)) for path in built]
