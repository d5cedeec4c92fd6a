"""What the audit shows of a kernel: a row of a table, for one variant on one GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from triton.backends.compiler import GPUTarget

from mpcore_audit.facts import Facts
from mpcore_audit.machine_code import Body
from mpcore_audit.verdict import findings
from mpcore_kernels._launch import Variant

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


def plain(value: Any) -> Any:
    """Returns `value` with sets made lists, as JSON wants them."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple | frozenset) else value
