"""Compiles every kernel for four GPUs, without one, reads the machine code and judges it.

    python -m mpcore_audit           a table
    python -m mpcore_audit --json    the same and more, for programs

One row is one kernel in one combination of dtypes on one GPU. The exit status is 0 if all rows keep
the rules of `verdict.findings`, 1 if one does not, and 2 if the audit could not be made.

What is compiled is what launchers launch: both take it from `mpcore_kernels._launch.Variant`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

import triton

from mpcore_audit.facts import Facts, examine
from mpcore_audit.rows import TARGETS, plain, row, table, target_name
from mpcore_audit.variants import variants


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the audit and prints it; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mpcore_audit",
        description="Compile every kernel for four GPUs and judge the machine code.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--kernel", default="", help="only variants whose name contains this")
    parser.add_argument(
        "--gpu",
        action="append",
        choices=[*map(target_name, TARGETS)],
        help="only this GPU; may be given several times (default: all of them)",
    )
    options = parser.parse_args(arguments)
    chosen = variants()
    if not all(isinstance(variant.kernel, triton.JITFunction) for variant in chosen):
        print(
            "audit: expected compiled kernels, got interpreted ones. Unset TRITON_INTERPRET.",
            file=sys.stderr,
        )
        return 2
    jobs = [
        (place, target)
        for place, variant in enumerate(chosen)
        for target, gpu in enumerate(TARGETS)
        if options.kernel in variant.name and target_name(gpu) in (options.gpu or target_name(gpu))
    ]
    # processes and not threads: Triton's compiler is not documented to be safe for those
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        facts = list(pool.map(_examine, jobs))
    audited = [(chosen[place], fact) for (place, _), fact in zip(jobs, facts, strict=True)]
    rows = [row(variant, facts) for variant, facts in audited]
    failed = [line for line in rows if line["verdict"] != "ok"]
    if options.json:
        records = [
            {**line, "facts": plain(asdict(facts))}
            for line, (_, facts) in zip(rows, audited, strict=True)
        ]
        print(json.dumps({"triton": triton.__version__, "rows": records}, indent=1))
    else:
        print(table(rows))
        print(f"\nTriton {triton.__version__}: {len(rows)} rows, {len(failed)} break a rule.")
    return 1 if failed else 0


def _examine(job: tuple[int, int]) -> Facts:
    """Examines one variant for one GPU, both given by their places: kernels cannot be pickled."""
    return examine(variants()[job[0]], TARGETS[job[1]])
