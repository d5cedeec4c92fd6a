"""Where mpcore raises a `StageError`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType

import mpcore

PACKAGE = Path(mpcore.__file__).parent


def _functions(node: ast.AST, within: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yields every function with its name, that of its class before it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield within + child.name, child
        inside = f"{child.name}." if isinstance(child, ast.ClassDef) else within
        yield from _functions(child, inside)


def _raises(function: ast.FunctionDef) -> list[ast.Raise]:
    """The statements of a function, but of none within it, that raise a StageError."""
    nested = {node for _, inner in _functions(function) for node in ast.walk(inner)}
    own = [node for node in ast.walk(function) if node not in nested]
    names = {
        target.id
        for node in own
        if isinstance(node, ast.Assign) and _makes_one(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return [
        node
        for node in own
        if isinstance(node, ast.Raise)
        and (_makes_one(node.exc) or (isinstance(node.exc, ast.Name) and node.exc.id in names))
    ]


def _makes_one(node: object) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "StageError"
    )


@cache
def sites() -> dict[str, tuple[Path, int, int]]:
    """Returns file, first and last line of every `raise StageError(...)` in mpcore, by name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        before = len(found)
        for function, body in _functions(tree):
            ordered = sorted(_raises(body), key=lambda node: node.lineno)
            for number, node in enumerate(ordered, start=1):
                name = f"{path.name} {function} {number}"
                assert name not in found
                found[name] = (path, node.lineno, node.end_lineno or node.lineno)
        made = sum(map(_makes_one, ast.walk(tree)))
        assert made == len(found) - before, f"{path}: a StageError that no statement raises"
    return found


def site_of(traceback: TracebackType | None) -> str | None:
    """Returns the name of the site where an exception was raised."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return None
    path, line = Path(traceback.tb_frame.f_code.co_filename), traceback.tb_lineno
    for name, (file, first, last) in sites().items():
        if path == file and first <= line <= last:
            return name
    return None
