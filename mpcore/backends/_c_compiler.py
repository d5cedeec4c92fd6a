"""The functions of the compiled backend: from a library in the package, or compiled right now."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from mpcore.backends import _c_command
from mpcore.errors import BackendError


@cache
def passes() -> ctypes.CDLL:
    """Returns `_passes.c` as a library: the one in the package, else compiled now: a second.

    Raises:
        BackendError: It is not in the package, and cannot be compiled.
    """
    built = find_built()
    if built is None:
        return load(f'#include "{_c_command.SOURCE}"')
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise BackendError(
            f"backend: expected a library that this system can load in {built}, got: {error}. Pass "
            'backend="cpu".'
        ) from error


@cache
def declared(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """Returns a function of the library, with the types that C gives it.

    Args:
        name: Of the function.
        result: Its type, None for void.
        arguments: The types of what it takes.

    Raises:
        BackendError: As `passes`.
    """
    function = getattr(passes(), name)
    function.argtypes, function.restype = arguments, result
    return cast(Callable[..., Any], function)


def find_built() -> Path | None:
    """Returns the library that came with the package and suits this processor, or None."""
    return _c_command.find_built(torch.backends.cpu.get_cpu_capability())


@cache
def comes_built() -> bool:
    """Whether a library came with the package that this system can load."""
    if find_built() is None:
        return False
    try:
        passes()
    except BackendError:
        return False
    return True


def check_can_run() -> None:
    """Raises `BackendError` unless the library is there or there is a C compiler."""
    if find_built() is None:
        _find_compiler()
    else:
        passes()


def _find_compiler() -> str:
    found = _c_command.find_compilers()
    if not found:
        raise BackendError(
            "backend: expected a C compiler, since this installation was built without the "
            f"compiled backend, found none of {', '.join(_c_command.COMPILERS)} on the path. "
            'Install one, or pass backend="cpu".'
        )
    return found[0]


@cache
def load(source: str) -> ctypes.CDLL:
    """Compiles a C source for this processor and loads it, once per process.

    Args:
        source: A complete file.

    Raises:
        BackendError: There is no compiler, it refused, or there is no folder to work in.

    Example:
        >>> load("int twice(int x) { return 2 * x; }").twice(21)
        42
    """
    compiler = _find_compiler()
    try:
        with tempfile.TemporaryDirectory(prefix="mpcore-") as folder:
            return _compiled(compiler, source, Path(folder))
    except OSError as error:
        raise BackendError(
            "backend: expected a temporary folder that code can be written to and run from for the "
            f"compiled backend, got: {error}. Name another folder in TMPDIR, or pass "
            'backend="cpu".'
        ) from error


def _compiled(compiler: str, source: str, folder: Path) -> ctypes.CDLL:
    code, library = folder / "passes.c", folder / "passes.so"
    code.write_text(source, encoding="utf-8")
    refusals = []
    for processor in _c_command.NATIVE:
        refusal = _c_command.build(compiler, code, library, processor)
        if refusal is None:
            return ctypes.CDLL(str(library))
        refusals.append(refusal)
    raise BackendError(
        f"backend: expected {compiler} to compile the passes of the compiled backend, got:\n"
        f'{refusals[-2]}\nInstall another compiler, or pass backend="cpu".'
    )
