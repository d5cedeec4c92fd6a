"""Results as a table, and as CSV."""

from __future__ import annotations

import csv
import io

from mpcore.base import Table
from mpcore.bench.experiment import BenchResult, Outcome
from mpcore.bench.rows import BASELINE, LOOP
from mpcore.bench.shapes import ParameterList

_MISSING = "n/a"

COLUMNS = (
    *("date", "device", "gpu", "cpu", "threads", "python", "mpcore", "torch", "torch_build"),
    *("triton", "shapes", "tensors", "parameters", "row", "label", "peer_version"),
    *("regime", "reason"),
    *("error_in_bounds", "bound", "rounds", "median_s", "lower_quartile_s", "upper_quartile_s"),
    *("ratio_to_amp_fused", "ratio_to_masters_loop", "resident_bytes_per_param"),
    *("peak_extra_bytes_per_param", "moved_bytes_per_param", "moved_passes", "launches"),
    *("host_reads", "achieved_bytes_per_s", "copy_bytes_per_s"),
)


def time_table(result: BenchResult, listed: ParameterList) -> Table:
    """Returns the times of one parameter list: of the rows that were right.

    Args:
        result: What was measured.
        listed: One of its lists.
    """
    return Table(
        title=f"{listed.name}: {listed.count:,} parameters in {len(listed.shapes):,} tensors, "
        f"{result.settings.rounds} interleaved rounds",
        header=(
            *("Row", "Median ms", "Lower quartile", "Upper quartile", "vs AMP fused"),
            *("vs by hand", "GB/s"),
        ),
        rows=tuple(_time_cells(result, outcome) for outcome in _timed(result, listed)),
        notes=tuple(
            f"Not timed: {o.row.label}: {o.reason}."
            for o in result.outcomes
            if o.listed == listed and o.reason is not None
        ),
    )


def bytes_table(result: BenchResult, listed: ParameterList) -> Table:
    """Returns bytes per parameter, launches and host reads of one parameter list.

    Args:
        result: What was measured.
        listed: One of its lists.
    """
    timed = _timed(result, listed)
    return Table(
        title=f"{listed.name}: bytes per parameter",
        header=("Row", "Resident", "Peak extra", "Moved (stated)", "Launches", "Host reads"),
        rows=tuple(_byte_cells(outcome) for outcome in timed),
        notes=tuple(f"{_versioned(o)}: {o.row.regime}. Moved: {o.row.traffic}." for o in timed),
    )


def _versioned(outcome: Outcome) -> str:
    row = outcome.row
    return row.label if row.version is None else f"{row.label} {row.version}"


def _timed(result: BenchResult, listed: ParameterList) -> list[Outcome]:
    return [o for o in result.outcomes if o.listed == listed and o.times is not None]


def notes(result: BenchResult) -> tuple[str, ...]:
    """Returns what a reader must know to believe the tables."""
    found = result.machine
    where = found["gpu"] or f"{found['cpu']}, threads: {found['threads']}"
    on_gpu = result.settings.device.type == "cuda"
    return (
        f"{found['date']}, {where}, PyTorch {found['torch']}, mpcore {found['mpcore']}. A step "
        f"unscales, clips the global norm and updates; gradients are refilled between steps.",
        "Every row's weights were compared with float64 AdamW after three steps before anything "
        "was timed. Peers keep less than FP32 where their regime says so: compare bytes as well.",
        "Resident: weights, gradients, masters, state, from the tensors. Extra: the most that a "
        "step allocates beyond, and buffers kept between steps; "
        + ("from torch.cuda." if on_gpu else "from the profiler's memory events."),
        f"Moved: stated, not measured. GB/s: moved over the median; a copy reaches "
        f"{result.copy_bandwidth / 1e9:.1f} GB/s here.",
        "Host reads: values read by the host (aten::_local_scalar_dense). "
        + (
            "Each waits for the GPU." if on_gpu else "On a CPU none waits, and nothing is launched."
        ),
    )


def _time_cells(result: BenchResult, outcome: Outcome) -> tuple[str, ...]:
    rate = achieved(outcome)
    quartiles = () if outcome.times is None else outcome.times.quartiles
    low, middle, high = (f"{1e3 * seconds:,.2f}" for seconds in quartiles)
    return (
        outcome.row.label,
        *(middle, low, high),
        _shown(result.ratio(outcome), "{:.2f}x"),
        _shown(result.ratio(outcome, LOOP), "{:.2f}x"),
        _shown(None if rate is None else rate / 1e9, "{:.1f}"),
    )


def _byte_cells(outcome: Outcome) -> tuple[str, ...]:
    return (
        outcome.row.label,
        _shown(outcome.resident, "{:.2f}"),
        _shown(outcome.peak_extra, "{:.3f}"),
        _shown(outcome.row.traffic.total, "{:g}"),
        _shown(outcome.launches, "{}"),
        _shown(outcome.host_reads, "{}"),
    )


def _shown(value: float | None, form: str) -> str:
    return _MISSING if value is None else form.format(value)


def achieved(outcome: Outcome) -> float | None:
    """Returns bytes per second: the stated traffic over the median; None without either."""
    moved = outcome.row.traffic.total
    if moved is None or outcome.times is None:
        return None
    return moved * outcome.listed.count / outcome.times.median


def to_csv(result: BenchResult) -> str:
    """Returns one line for each row and parameter list, below a line of column names.

    Args:
        result: What was measured. Rows without numbers are there as well, with the reason.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for outcome in result.outcomes:
        writer.writerow({**result.machine, **_fields(result, outcome)})
    return text.getvalue()


def records(result: BenchResult) -> list[dict[str, object]]:
    """Returns every number of every row and parameter list, as the CSV has them."""
    return [_fields(result, outcome) for outcome in result.outcomes]


def _fields(result: BenchResult, outcome: Outcome) -> dict[str, object]:
    row, listed, times = outcome.row, outcome.listed, outcome.times
    # csv writes None as an empty field
    low, middle, high = (None,) * 3 if times is None else times.quartiles
    return {
        "shapes": listed.name,
        "tensors": len(listed.shapes),
        "parameters": listed.count,
        "row": row.key,
        "label": row.label,
        "peer_version": row.version,
        "regime": row.regime,
        "reason": outcome.reason,
        "error_in_bounds": outcome.error,
        "bound": str(row.bound),
        "rounds": result.settings.rounds,
        "median_s": middle,
        "lower_quartile_s": low,
        "upper_quartile_s": high,
        "ratio_to_amp_fused": result.ratio(outcome, BASELINE),
        "ratio_to_masters_loop": result.ratio(outcome, LOOP),
        "resident_bytes_per_param": outcome.resident,
        "peak_extra_bytes_per_param": outcome.peak_extra,
        "moved_bytes_per_param": row.traffic.total,
        "moved_passes": str(row.traffic),
        "launches": outcome.launches,
        "host_reads": outcome.host_reads,
        "achieved_bytes_per_s": achieved(outcome),
        "copy_bytes_per_s": result.copy_bandwidth,
    }
