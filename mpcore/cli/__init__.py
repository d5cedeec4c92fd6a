"""The command line. `main` is what the `mpcore` program runs; the rest needs the `demo` extra.

`mpcore bench` needs the `bench` extra only, which is a part of it.
"""

from __future__ import annotations

import sys
from typing import Any

_EXTRA = frozenset(
    {"typer", "rich", "matplotlib", "jinja2", "markupsafe", "numpy", "sklearn", "scipy"}
)


def main() -> None:
    """Runs the command line; exits with 1 and one line of advice if the extra is missing."""
    try:
        from mpcore.cli.commands import app

        app(prog_name="mpcore")  # the commands import what they need when they run
    except ModuleNotFoundError as error:
        sys.exit(missing_extra(error))


def missing_extra(error: ModuleNotFoundError) -> str:
    """Turns the import error of a package of the `demo` extra into advice.

    Args:
        error: What an import raised.

    Raises:
        ModuleNotFoundError: `error` itself, if it is about another package: a bug, not a missing
            extra.

    Example:
        >>> missing_extra(ModuleNotFoundError("No module named 'typer'", name="typer"))
        'mpcore: the command line needs typer. Run: pip install "mpcore[demo]"'
    """
    package = (error.name or "").split(".")[0]
    if package not in _EXTRA:
        raise error
    name = {"sklearn": "scikit-learn"}.get(package, package)
    return f'mpcore: the command line needs {name}. Run: pip install "mpcore[demo]"'


def __getattr__(name: str) -> Any:
    # importing this package must not need the extra
    if name == "app":
        from mpcore.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
