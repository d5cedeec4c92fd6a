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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SOURCE, HEADER = HERE / "_passes.c", HERE / "_steps.h"
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


def find_compiler() -> str | None:
    """Returns the path of a C compiler, None if there is none."""
    return next((path for path in map(shutil.which, COMPILERS) if path is not None), None)


def identity() -> str:
    """Returns what is another string for another source."""
    digest = hashlib.sha256()
    for path in (SOURCE, HEADER, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def build(compiler: str, source: Path, library: Path, processor: Iterable[str]) -> str | None:
    """Compiles a file into a library; returns what the compiler said if it refused, else None."""
    command = [compiler, *FLAGS, *processor, str(source), "-o", str(library), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
    if capability not in known:
        capability = ""
    for name, _ in list(known.values())[list(known).index(capability) :]:
        path = BUILT / f"passes-{name}-{identity()}.so"
        if path.is_file():
            return path
    return None


def build_levels() -> list[Path]:
    """Builds a library for each level into `BUILT` in place of older ones; returns them.

    Levels that the compiler does not know are left out, all of them if there is no compiler.
    """
    compiler, known = find_compiler(), list(levels(platform.machine()).values())
    BUILT.mkdir(exist_ok=True)
    for old in BUILT.glob("passes-*.so"):
        old.unlink()
    if compiler is None:
        return []
    libraries = [BUILT / f"passes-{name}-{identity()}.so" for name, _ in known]

    def attempt(library: Path, flags: tuple[str, ...]) -> str | None:
        return build(compiler, SOURCE, library, flags)

    with ThreadPoolExecutor() as pool:
        refusals = list(pool.map(attempt, libraries, (flags for _, flags in known)))
    return [path for path, refusal in zip(libraries, refusals, strict=True) if refusal is None]
