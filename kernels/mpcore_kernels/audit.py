"""Compiles every kernel for four GPUs, without one, reads the machine code and judges it.

    python -m mpcore_kernels.audit           a table
    python -m mpcore_kernels.audit --json    the same and more, for programs

One row is one kernel in one combination of dtypes on one GPU. The exit status is 0 if all rows keep
the rules of `_verdict.findings`, 1 if one does not, and 2 if the audit could not be made.

What is compiled is what launchers launch: both take it from `_launch.Variant`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from mpcore_kernels._facts import Facts, examine
from mpcore_kernels._launch import Variant
from mpcore_kernels._machine_code import Body
from mpcore_kernels._variants import variants
from mpcore_kernels._verdict import findings

TARGETS = (
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx942", 64),
)
COLUMNS = (
    "kernel",
    "GPU",
    "registers",
    "stack",
    "spills",
    "loads",
    "stores",
    "bytes",
    "per chunk",
    "barriers",
    "instructions",
    "masked",
    "verdict",
)


def target_name(target: GPUTarget) -> str:
    """Returns a GPU's name as its maker calls it: `"sm_90"`, `"gfx942"`."""
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def row(variant: Variant, facts: Facts) -> dict[str, str]:
    """Returns what the table says about one variant on one GPU, by column."""
    cells = {
        "kernel": variant.name,
        "GPU": facts.target,
        "registers": str(facts.registers),
        "stack": str(facts.stack),
        "spills": str(facts.spills),
        "barriers": str(facts.barriers),
        "verdict": "; ".join(findings(variant, facts)) or "ok",
    }
    if variant.chunk:
        elements = variant.chunk // facts.threads
        full, *masked = facts.bodies
        cells |= {
            "loads": _widths(full.loads),
            "stores": _widths(full.stores),
            "bytes": f"{full.bytes / elements:g} of {variant.bytes_needed}",
            "per chunk": _per_chunk(variant, full),
            "barriers": str(full.barriers),
            "instructions": f"{full.instructions / elements:.1f}",
            "masked": "".join(map(_masked, masked)),
        }
    return {column: cells.get(column, "") or "-" for column in COLUMNS}


def _per_chunk(variant: Variant, full: Body) -> str:
    """Returns how many bytes a program writes about its chunk, of how many."""
    parts = []
    if variant.results or full.results:
        parts.append(f"{full.bytes_per_chunk} of {variant.bytes_needed_per_chunk}")
    if variant.counters:
        parts.append(f"adds to {sum(variant.counters)}")
    if variant.additions:
        parts.append(f"threads add {variant.additions} times")
    return ", ".join(parts)


def _masked(body: Body) -> str:
    """Returns how a chunk that is not full, or not aligned, is read and written."""
    return f"{_widths(body.loads)} in, {_widths(body.stores)} out, barriers: {body.barriers}"


def _widths(accesses: Any) -> str:
    """Returns the widest and the narrowest of some accesses in bits."""
    return "-".join(str(8 * width) for width in sorted({*_ends(accesses)}, reverse=True)) or "none"


def _ends(accesses: Iterable[int]) -> list[int]:
    found = sorted(accesses)
    return found[:1] + found[-1:]


def table(rows: Sequence[dict[str, str]]) -> str:
    """Returns rows as a Markdown table with aligned columns."""
    lines = [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]
    widths = {column: max(len(line[column]) for line in lines) for column in COLUMNS}
    text = [
        "| " + " | ".join(line[column].ljust(widths[column]) for column in COLUMNS) + " |"
        for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (widths[column] + 2) for column in COLUMNS) + "|")
    return "\n".join(text)


def is_chosen(variant: Variant, part: str, without: Sequence[str]) -> bool:
    """Returns whether a variant's name contains `part` and nothing of `without`."""
    return part in variant.name and not any(word in variant.name for word in without)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mpcore_kernels.audit",
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
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        help="no variants whose name contains this; may be given several times",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the audit and prints it; returns the exit status."""
    options = _parser().parse_args(arguments)
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
        if is_chosen(variant, options.kernel, options.without)
        and target_name(gpu) in (options.gpu or target_name(gpu))
    ]
    # processes and not threads: Triton's compiler is not documented to be safe for those
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        facts = list(pool.map(_examine, jobs))
    audited = [(chosen[place], fact) for (place, _), fact in zip(jobs, facts, strict=True)]
    rows = [row(variant, facts) for variant, facts in audited]
    failed = [line for line in rows if line["verdict"] != "ok"]
    if options.json:
        records = [
            {**line, "facts": _plain(asdict(facts))}
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


def _plain(value: Any) -> Any:
    """Returns `value` with sets made lists, as JSON wants them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return (
        [_plain(item) for item in value] if isinstance(value, list | tuple | frozenset) else value
    )


if __name__ == "__main__":
    sys.exit(main())
