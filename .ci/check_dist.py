"""Installs the wheels and the sdist of a folder, each in an environment of its own; tries them.

    python .ci/check_dist.py dist

An environment holds the distribution and exactly what its metadata says it needs: a link is made
to each file of torch and of torch's own requirements in the running environment, so that a
dependency which was never declared is missing there, and nothing is downloaded twice.

Before that, the wheel is searched for what is for us alone: tests and the audit of machine code.
The environment's programs alone are on the PATH, so that nothing can be compiled there: a wheel for
any platform has to train without the library in C.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SMOKE = Path(__file__).resolve().parent / "dist_smoke.py"
FOR_US_ALONE = {"mpcore_audit", "mpcore_testing", "tests"}


def closure(requirements: Iterable[str]) -> Iterator[metadata.Distribution]:
    """Yields the installed distributions that `requirements` need, transitively, each once."""
    seen: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not wanted or name in seen:
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        waiting += [Requirement(text) for text in distribution.requires or []]
        yield distribution


def link(distribution: metadata.Distribution, site: Path) -> None:
    """Links the top-level files and folders of `distribution` into `site`."""
    for top in {file.parts[0] for file in distribution.files or []} - {".."}:
        target = Path(str(distribution.locate_file(top)))
        # __pycache__ is shared by single-module distributions; Python makes its own
        if top != "__pycache__" and not (site / top).exists():
            (site / top).symlink_to(target)


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> None:
    """Runs a command away from the repository; raises if it fails.

    Args:
        command: Program and arguments.
        cwd: Where.
        path: The only folder in which it finds programs; None: as here.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    if path is not None:
        environment["PATH"] = str(path)
    subprocess.run([str(part) for part in command], check=True, cwd=cwd, env=environment)


def wheel_of(artifact: Path, folder: Path) -> Path:
    """Returns `artifact` if it is a wheel, otherwise the wheel that the sdist builds."""
    if artifact.suffix == ".whl":
        return artifact
    flags = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *flags, artifact, cwd=folder)
    return next(folder.glob("*.whl"))


def check_contents(wheel: Path) -> None:
    """Ends the program if `wheel` holds a test, or a folder that is for us alone."""
    with zipfile.ZipFile(wheel) as archive:
        names = [Path(name) for name in archive.namelist()]
    found = [n for n in names if FOR_US_ALONE & {*n.parts} or n.name.startswith("test_")]
    if found:
        sys.exit(f"{wheel.name}: expected no tests and no audit, got {', '.join(map(str, found))}")


def check(artifact: Path) -> None:
    """Installs `artifact` in a fresh environment and runs the smoke test there."""
    with tempfile.TemporaryDirectory(prefix="mpcore-dist-") as name:
        folder = Path(name)
        wheel = wheel_of(artifact, folder)
        check_contents(wheel)
        venv.create(folder / "env", with_pip=False, symlinks=True)
        python = folder / "env" / "bin" / "python"
        flags = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
        pip = (sys.executable, "-m", "pip", "--python", python)
        run(*pip, "install", *flags, wheel, cwd=folder)
        site = next((folder / "env" / "lib").glob("python*/site-packages"))
        (installed,) = metadata.distributions(name="mpcore", path=[str(site)])
        for distribution in closure(installed.requires or []):
            link(distribution, site)
        run(*pip, "check", cwd=folder)
        backend = "cpu" if wheel.stem.endswith("-any") else "compiled"
        run(python, "-I", "-W", "ignore", SMOKE, backend, cwd=folder, path=python.parent)


def main() -> int:
    """Checks every wheel and sdist of the folder named on the command line."""
    folder = Path(sys.argv[1]).resolve()
    artifacts = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    if not {".whl", ".gz"} <= {artifact.suffix for artifact in artifacts}:
        print(f"{folder}: expected wheels and an sdist, got {[a.name for a in artifacts]}")
        return 1
    for artifact in artifacts:
        try:
            check(artifact)
        except subprocess.CalledProcessError as error:
            print(f"{artifact.name}: failed in {' '.join(error.cmd)}")
            return 1
        print(f"{artifact.name}: installs, imports and trains")
    return 0


if __name__ == "__main__":
    sys.exit(main())
