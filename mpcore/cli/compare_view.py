"""`mpcore compare` on the terminal: a training loop by name, progress, a table, a page."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.text import Text

from mpcore.base import check_count
from mpcore.cli.json_view import comparison_facts, to_json
from mpcore.cli.output import Bars, check_writable, progress_on, show_table
from mpcore.cli.user_code import UserCodeError, trimmed
from mpcore.comparison.compare import compare
from mpcore.comparison.contender import contenders
from mpcore.comparison.result import Comparison
from mpcore.errors import ArgumentError, MpcoreError
from mpcore.report.compare_page import render_comparison


@dataclass(frozen=True)
class CompareOptions:
    """The options of `mpcore compare`."""

    policies: str
    seeds: int
    first_seed: int
    metric: str
    higher_is_better: bool
    margin: float
    output: Path
    as_json: bool


def compare_and_show(target: str, options: CompareOptions, console: Console) -> None:
    """Runs a comparison, prints its table and verdicts, and writes its page.

    What is complete is shown and written also if the loop raises or is interrupted: of every seed
    that all policies have trained with.

    Args:
        target: "file.py:function" or "package.module:function".
        options: From the command line.
        console: Where to print; not with `as_json`, which prints JSON to standard output.

    Raises:
        ArgumentError: There is no such function, or the page cannot be written.
        UserCodeError: The user's file or function raised.
        KeyboardInterrupt: As the user wished.
    """
    check_writable(options.output, "mpcore-compare.html")
    train = load_function(target)
    policies = [name.strip() for name in options.policies.split(",")]
    contenders(policies)  # what is wrong is said before a progress bar
    check_count("seeds", options.seeds)
    seeds = [*range(options.first_seed, options.first_seed + options.seeds)]
    complete: list[Comparison] = []
    try:
        _compare(train, policies, seeds, options, complete.append)
    except KeyboardInterrupt:
        _say(f"Interrupted in seed {seeds[len(complete)]}.")
        raise
    except Exception as error:
        if isinstance(error, MpcoreError) and not trimmed(error):
            raise  # of an argument: no line of the user's was running
        raise UserCodeError(error) from error
    finally:
        if complete:
            _show(complete[-1], seeds, options, console)


def _compare(
    train: Any,
    policies: Sequence[str],
    seeds: Sequence[int],
    options: CompareOptions,
    on_seed: Callable[[Comparison], object],
) -> None:
    """Runs all of it under a progress bar, which goes to the terminal alone."""
    with progress_on(Console(stderr=True)) as progress:
        done, total = count(), len(seeds) * (len(policies) + 1)
        advance = Bars(progress).begin("Runs", total)
        compare(
            train,
            policies,
            seeds=seeds,
            metric=options.metric,
            higher_is_better=options.higher_is_better,
            margin=options.margin,
            on_run=lambda label, seed: advance(next(done), f"{label}, seed {seed}"),
            on_seed=on_seed,
        )
        advance(total, "")


def _show(
    result: Comparison, seeds: Sequence[int], options: CompareOptions, console: Console
) -> None:
    options.output.write_text(render_comparison(result), encoding="utf-8")
    if options.as_json:
        print(to_json(comparison_facts(result, seeds, str(options.output))))
        return
    show_table(result.table(), console)
    for label, found in result.agreements.items():
        console.print(Text.assemble((f"{label}: ", "bold"), found.text))
    missing = len(seeds) - len(result.of(result.labels[0]))
    if missing:
        console.print(f"Of {len(seeds)} seeds {missing} are missing.")
    console.print("\nReport: ", end="")
    console.print(Text(str(options.output), "bold"), soft_wrap=True)


def _say(text: str) -> None:
    print(f"mpcore: {text}", file=sys.stderr)


def load_function(target: str) -> Any:
    """Returns the function that "file.py:function" or "package.module:function" names.

    Modules are also looked for in the current folder; those beside a file can be imported by it.

    Raises:
        ArgumentError: There is none.
        UserCodeError: The module raised when it was imported.

    Example:
        >>> load_function("math:sqrt")(4.0)
        2.0
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ArgumentError(
            f"target: expected file.py:function or package.module:function, got {target!r}."
        )
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else _from_name(place)
    except Exception as error:
        if isinstance(error, (ModuleNotFoundError, FileNotFoundError)) and not trimmed(error):
            raise ArgumentError(f"target: expected a module, got {place!r}: {error}.") from error
        raise UserCodeError(error) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        public = ", ".join(key for key in known if not key.startswith("_"))
        raise ArgumentError(
            f"target: expected a function of {place}, got {name!r}. It has: {public or 'none'}."
        )
    return function


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickles look themselves up there
    _look_in(path.absolute().parent)
    spec.loader.exec_module(module)
    return module


def _from_name(name: str) -> ModuleType:
    _look_in(Path.cwd())
    return importlib.import_module(name)


def _look_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
