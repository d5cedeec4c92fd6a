"""`make golden`: runs the golden cases and shows what moved since they were recorded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mpcore_testing.golden.comparison import Move, compare
from mpcore_testing.golden.recording import FOLDER, Recording, load, save
from mpcore_testing.golden.runs import RUNS, Run, in_processes

Runner = Callable[[Sequence[Run]], Iterable[Recording]]


def show(runs: Sequence[Run], folder: Path, run_all: Runner) -> int:
    """Prints a line for each run and what moved in it; returns how many did not stay the same."""
    recorded = load(folder)
    width = max(len(run.case) for run in runs)
    moved = 0
    for run, fresh in zip(runs, run_all(runs), strict=True):
        known = run.case in recorded
        moves = compare(recorded[run.case], fresh) if known else []
        verdict = "new" if not known else "MOVED" if moves else "same"
        moved += verdict != "same"
        print(f"{run.case:{width}}  {run.how:18}  {verdict}", flush=True)
        for move in moves:
            print(f"    {move}")
    print(f"{len(runs)} runs, {moved} of them not as recorded")
    return moved


def gone(folder: Path) -> list[str]:
    """Returns the names of recordings that no case has."""
    return sorted(set(load(folder)) - {run.case for run in RUNS})


def write(runs: Sequence[Run], folder: Path, run_all: Runner) -> int:
    """Records anew; returns how many runs have not the bits of another one that must have them.

    Nothing is written then.
    """
    first: dict[str, Recording] = {}
    disagreements: list[tuple[Run, list[Move]]] = []
    for run, fresh in zip(runs, run_all(runs), strict=True):
        moves = compare(first.setdefault(run.case, fresh), fresh)
        if moves:
            disagreements.append((run, moves))
    for run, moves in disagreements:
        print(f"{run} has other bits than the first backend of its case:")
        print("".join(f"    {move}\n" for move in moves), end="")
    if disagreements:
        print("nothing was written: one recording is for all backends of a case")
    else:
        save(first.values(), folder)
        print(f"{len(first)} cases recorded from {len(runs)} runs in {folder}")
    return len(disagreements)


def main(
    arguments: Sequence[str] | None = None,
    folder: Path = FOLDER,
    run_all: Runner = in_processes,
) -> int:
    """Returns the exit status: 0 if nothing moved."""
    parser = argparse.ArgumentParser(prog="make golden", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record anew what all cases give")
    parser.add_argument("words", nargs="*", help="choose runs whose name has any of these")
    parser.add_argument("--without", action="append", default=[], metavar="WORD", help="leave out")
    options = parser.parse_args(arguments)
    if options.write and (options.words or options.without):
        parser.error("--write: all cases are recorded together; give no words")
    runs = [
        run
        for run in RUNS
        if not options.words or any(word in str(run) for word in options.words)
        if not any(word in str(run) for word in options.without)
    ]
    if not runs:
        parser.error("no run has such a name; without words all runs and their names are shown")
    if options.write:
        return min(write(runs, folder, run_all), 1)
    moved = show(runs, folder, run_all)
    for name in gone(folder):
        print(f"{name}: recorded, and no case any more; make golden ARGS=--write drops it")
    return min(moved + len(gone(folder)), 1)


if __name__ == "__main__":
    sys.exit(main())
