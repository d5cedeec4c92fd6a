"""Builds what a release consists of into a folder: the sdist and two wheels made from it.

    python .ci/build_dist.py dist

- `manylinux`: with the library in C, for the Linux machines of this processor family whose glibc is
  no older than auditwheel says;
- `any`: built where no compiler is to be found, for everything else.

Ends with what `auditwheel show` and `twine check --strict` say of them, and with an error if they
find a fault.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent


def run(*command: str | Path, path: str | None = None) -> str:
    """Runs a command and returns what it prints; ends the program if it fails.

    Args:
        command: Program and arguments.
        path: Where it finds other programs; None: the tools of this environment first.
    """
    found = f"{TOOLS}{os.pathsep}{os.environ['PATH']}" if path is None else path
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"PATH": found, "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def build(kind: str, source: Path, folder: Path, path: str | None = None) -> Path:
    """Builds the sdist or a wheel of `source`; returns the file."""
    with tempfile.TemporaryDirectory(prefix="mpcore-build-") as name:
        flags = ("--no-isolation", f"--{kind}", "--outdir", name)
        run(sys.executable, "-m", "build", *flags, source, path=path)
        (made,) = Path(name).iterdir()
        return Path(shutil.move(made, folder / made.name))


def build_wheels(sdist: Path, folder: Path, scratch: Path) -> None:
    """Builds the wheel of this platform and the one for any."""
    shutil.unpack_archive(sdist, scratch, filter="data")
    (source,) = (path for path in scratch.iterdir() if path.is_dir())
    (empty := scratch / "nothing").mkdir()
    pure = build("wheel", source, folder, path=str(empty))
    if not pure.stem.endswith("-py3-none-any"):
        sys.exit(f"expected a wheel for any platform where no compiler is, got {pure.name}")
    made = build("wheel", source, scratch)
    if sys.platform == "linux":
        run("auditwheel", "repair", "--wheel-dir", folder, made)
        (wheel,) = folder.glob("*manylinux*.whl")
        print(run("auditwheel", "show", wheel).strip())
    elif made.name != pure.name:
        shutil.copy(made, folder)


def main() -> None:
    """Builds into the folder named on the command line, which must not be there yet."""
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True)
    sdist = build("sdist", ROOT, folder)
    with tempfile.TemporaryDirectory(prefix="mpcore-build-") as scratch:
        build_wheels(sdist, folder, Path(scratch))
    files = sorted(folder.iterdir())
    print(run(sys.executable, "-m", "twine", "check", "--strict", *files).strip())


if __name__ == "__main__":
    main()
