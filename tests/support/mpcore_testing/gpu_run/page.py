"""The JSON of a run as the results of docs/gpu.md. Needs no torch.

What a rehearsal measured is not shown: its times say nothing about a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

#: in the page: what is below it is replaced
MARK = "<!-- results: what is below is written by `make gpu` -->"

_Found = dict[str, Any]


def to_page(found: _Found, template: str) -> str:
    """Returns the whole page: the template down to the mark, then the results.

    Args:
        found: The JSON of a run, finished or not.
        template: A page with `MARK` in it.
    """
    head, mark, _ = template.partition(MARK)
    if not mark:
        raise ValueError(f"template: expected a line {MARK!r}, got none.")
    rehearsal = found["mode"] == "rehearsal"
    lines = [_intro(found, rehearsal), ""]
    writers: dict[str, Callable[[_Found, bool], Iterable[str]]] = {
        "machine": _machine,
        "bits": _bits,
        "engine": _engine,
        "steps": _steps,
        "training": _training,
    }
    for name, part in found["parts"].items():
        lines += [f"### {part['title']}", "", f"Status: {part['status']}.", ""]
        if part.get("rows") or part.get("facts"):
            lines += writers.get(name, _nothing)(part, rehearsal)
        lines += _failures(part)
    return head + mark + "\n\n" + "\n".join(lines).rstrip() + "\n"


def _intro(found: _Found, rehearsal: bool) -> str:
    ended = found["ended"] or "not ended: this run was cut off"
    if not rehearsal:
        return f"Mode: {found['mode']}. Started {found['started']}, ended {ended}."
    return (
        "**This was a rehearsal on a CPU: no GPU was there.** Kernels were interpreted on small "
        "tensors; times, rates and memory are left out as `...`. "
        f"Started {found['started']}, ended {ended}."
    )


def _nothing(part: _Found, rehearsal: bool) -> Iterable[str]:
    return ()


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [*(f"| {' | '.join(_cell(c) for c in cells)} |" for cells in lines), ""]


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _good(part: _Found) -> list[_Found]:
    return [row for row in part.get("rows", ()) if "error" not in row]


def _machine(part: _Found, rehearsal: bool) -> list[str]:
    facts = {**part["facts"]}
    for row in _good(part):
        facts |= {k: v for k, v in row.items() if k not in ("name", "seconds")}
    facts |= facts.pop("driver", None) or {}
    shown = [(key, value) for key, value in facts.items() if value is not None]
    return _table(("what", "value"), [(key, f"{value}") for key, value in shown])


def _differing(row: _Found) -> tuple[str, str, str, str]:
    first = row["first"]
    return (
        f"{row['values']:,}",
        f"{row['different']:,}",
        f"{row['max_ulp']:,}" + (f", {row['other']:,} without distance" if row["other"] else ""),
        _first(first) if first else "",
    )


def _first(first: _Found) -> str:
    inputs = ", ".join(f"{key} {value}" for key, value in first["inputs"].items())
    place = f"{first['of']}[{first['index']}]: got {first['got']}, expected {first['expected']}"
    return place + (f"; from {inputs}" if inputs else "")


def _sum(rows: Sequence[_Found]) -> str:
    values, different = (sum(row[key] for row in rows) for key in ("values", "different"))
    bad = sum(1 for row in rows if row["different"])
    return f"{len(rows)} rows, {values:,} values; {different:,} differ, in {bad} rows."


def _bits(part: _Found, rehearsal: bool) -> list[str]:
    rows = [row for row in _good(part) if "values" in row]
    header = ("kernel", "values", "different", "largest ULP", "first difference")
    return [_sum(rows), "", *_table(header, [(row["name"], *_differing(row)) for row in rows])]


def _engine(part: _Found, rehearsal: bool) -> list[str]:
    rows = _good(part)
    compared = [row for row in rows if "values" in row]
    lines = [_sum(compared), ""]
    header = ("steps", "values", "different", "largest ULP", "counters", "graph against launches")
    lines += _table(header, [_engine_cells(row) for row in compared])
    waits = [row for row in rows if "waits" in row]
    told = [(row["name"], "waits" if row["waits"] else "none") for row in waits]
    lines += _table(("steps under sync debug mode", "waits for the device"), told)
    for row in waits:
        if row["waits"]:
            lines += ["```text", row["waits"].rstrip(), "```", ""]
    return lines


def _engine_cells(row: _Found) -> tuple[str, ...]:
    as_expected = row["counters"] == row["expected"]
    counters = "as expected" if as_expected else f"{row['counters']}, not {row['expected']}"
    eager = row.get("launched_one_by_one")
    graph = "" if eager is None else f"{eager['different']:,} of {eager['values']:,} differ"
    return (row["name"], *_differing(row)[:3], counters, graph)


def _measured(value: float | None, form: str, rehearsal: bool) -> str:
    if rehearsal:
        return "..."
    return "n/a" if value is None else form.format(value)


def _steps(part: _Found, rehearsal: bool) -> list[str]:
    rows = _good(part)
    copied = next((row["bytes_per_second"] for row in rows if row["name"] == "copy"), None)
    rate = _measured(copied and copied / 1e9, "{:,.0f}", rehearsal)
    lines = [f"A copy reaches {rate} GB/s.", ""]
    for timed in (row for row in rows if "times" in row):
        name = timed["list"]
        here = [row for row in rows if row.get("list") == name]
        lines += [
            f"{name}: {timed['parameters']:,} parameters in {timed['tensors']:,} tensors, "
            f"{timed['rounds']} interleaved rounds.",
            "",
        ]
        lines += _step_table(timed, here, copied, rehearsal)
        checks = [row for row in here if "wrong" in row]
        lines += [
            f"- Not timed: {key}: {why}."
            for row in checks
            for key, why in row["wrong"].items()
            if why
        ]
    small = [row for row in rows if "does_not_fit" in row]
    lines += [f"- Not run: {row['name']}: {row['does_not_fit']}." for row in small]
    return [*lines, ""]


def _step_table(
    timed: _Found, here: Sequence[_Found], copied: float | None, rehearsal: bool
) -> list[str]:
    queued = next((row["queued_s"] for row in here if "queued_s" in row), {})
    base = queued.get("amp-fused")
    host = next((row["host_s"] for row in here if "host_s" in row), {})
    counts = {row["key"]: row for row in here if "resident_bytes" in row}
    rows = []
    for key, times in timed["times"].items():
        count, moved, behind = (
            counts.get(key, {}),
            times["moved_bytes_per_parameter"],
            queued.get(key),
        )
        reached = moved * timed["parameters"] / behind if moved and behind else None
        share = None if not (reached and copied) else reached / copied
        resident = count.get("resident_bytes")
        rows.append(
            (
                times["label"],
                _measured(1e3 * times["median_s"], "{:.3f}", rehearsal),
                _measured(behind and 1e3 * behind, "{:.3f}", rehearsal),
                _measured(behind / base if behind and base else None, "{:.2f}x", rehearsal),
                _measured(reached and reached / 1e9, "{:,.0f}", rehearsal),
                _measured(share, "{:.0%}", rehearsal),
                _measured(1e3 * host[key] if key in host else None, "{:.3f}", rehearsal),
                _measured(count.get("launches"), "{}", rehearsal),
                "n/a" if "host_reads" not in count else f"{count['host_reads']}",
                "n/a" if resident is None else f"{resident / timed['parameters']:.2f}",
            )
        )
    header = (
        *("step", "ms from idle", "ms queued", "vs AMP fused", "GB/s", "of a copy"),
        *("host ms", "launches", "host reads", "bytes kept per parameter"),
    )
    return _table(header, rows)


def _training(part: _Found, rehearsal: bool) -> list[str]:
    rows = _good(part)
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == model]
        done = [row for row in here if not row.get("out_of_memory")]
        if done:
            one = done[0]
            lines += [
                f"{model}: {one['parameters']:,} parameters, batch {one['batch']} of "
                f"{one['context']} random tokens.",
                "",
                *_training_table(done, rehearsal),
            ]
        lines += [f"- Out of memory: {row['name']}." for row in here if row.get("out_of_memory")]
    return [*lines, ""]


def _training_table(done: Sequence[_Found], rehearsal: bool) -> list[str]:
    base = next((row for row in done if row["key"] == "fp32" and not row["wrong"]), None)
    tf32 = next((row for row in done if row["key"] == "tf32" and not row["wrong"]), None)
    header = (
        *("regime", "tokens/s", "vs FP32", "vs TF32", "peak GiB", "vs FP32", "skipped"),
        *("loss, first to last", "check"),
    )
    return _table(header, [_training_cells(row, base, tf32, rehearsal) for row in done])


def _training_cells(
    row: _Found, base: _Found | None, tf32: _Found | None, rehearsal: bool
) -> tuple[str, ...]:
    def ratio(key: str, other: _Found | None) -> float | None:
        return None if other is None or row[key] is None else row[key] / other[key]

    losses = f"{row['losses'][0]:.4f} to {row['losses'][-1]:.4f}"
    if row["wrong"]:  # what is wrong has no speed
        return (row["label"], *["not shown"] * 5, f"{row['skipped']}", losses, row["wrong"])
    peak = row["peak_bytes"]
    return (
        row["label"],
        _measured(row["tokens_per_second"], "{:,.0f}", rehearsal),
        _measured(ratio("tokens_per_second", base), "{:.2f}x", rehearsal),
        _measured(ratio("tokens_per_second", tf32), "{:.2f}x", rehearsal),
        _measured(peak and peak / 2**30, "{:.2f}", rehearsal),
        _measured(ratio("peak_bytes", base), "{:.0%}", rehearsal),
        f"{row['skipped']}",
        losses,
        "passed",
    )


def _failures(part: _Found) -> list[str]:
    lines = [f"- Failed: {row['name']}: {_cell(row['error'])}" for row in _bad(part)]
    if part.get("why"):
        lines.append(f"- {part['why']}.")
    if part.get("not_run"):
        lines.append(f"- Not run, the time was used: {_cell('; '.join(part['not_run']))}.")
    tracebacks = [row["traceback"].rstrip() for row in _bad(part)][:3]
    if part.get("output"):
        tracebacks.append("\n".join(part["output"]))
    for text in tracebacks:
        lines += ["", "```text", text.replace("```", "'''"), "```"]
    return [*lines, ""] if lines else []


def _bad(part: _Found) -> list[_Found]:
    return [row for row in part.get("rows", ()) if "error" in row]
