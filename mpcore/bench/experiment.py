"""The experiment: build rows, check them, count, and time those that are right."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

import torch

from mpcore.base import examine_cpu, find_versions, torch_build
from mpcore.bench.check import CHECKED_STEPS, checked_step, errors, verdict
from mpcore.bench.compact_rows import compact_rows
from mpcore.bench.contenders import Contender
from mpcore.bench.counting import HostReads, allocated, compiled_host_reads, launches
from mpcore.bench.peers import peer_rows
from mpcore.bench.problem import Problem, make_problem
from mpcore.bench.rows import BASELINE, Row, own_rows
from mpcore.bench.shapes import ParameterList
from mpcore.bench.tensors import synchronize
from mpcore.bench.timing import Times, copy_bandwidth, time_rounds
from mpcore.errors import ArgumentError
from mpcore.monitoring.memory import storage_bytes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
        lists: The parameter lists.
        rounds: Timed steps of each row.
        threads: CPU threads.
        device: Where.
        dtype: "float16" or "bfloat16": parameters of the rows with masters.
        backend: Of the mpcore rows.
        rows: Keys of the rows to run; None for all but those of compact states. The row that others
            are compared with is added.
    """

    lists: tuple[ParameterList, ...]
    rounds: int = 21
    threads: int = 2
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: str = "float16"
    backend: str = "auto"
    rows: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.lists:
            raise ArgumentError("shapes: expected at least one parameter list, got none.")
        for name, value in (("rounds", self.rounds), ("threads", self.threads)):
            if value < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {value}.")
        if self.dtype not in DTYPES:
            raise ArgumentError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}.")

    def chosen_rows(self) -> tuple[Row, ...]:
        """Returns the rows to run.

        Raises:
            ArgumentError: There is no row of a name.
        """
        how = DTYPES[self.dtype], self.backend, self.device
        everything = (*own_rows(*how), *compact_rows(*how), *peer_rows(self.device))
        if self.rows is None:
            return tuple(row for row in everything if not row.named_only)
        known = [row.key for row in everything]
        unknown = [key for key in self.rows if key not in known]
        if unknown:
            raise ArgumentError(f"rows: expected some of {', '.join(known)}, got {unknown[0]!r}.")
        wanted = {*self.rows, BASELINE}
        return tuple(row for row in everything if row.key in wanted)


@dataclass(frozen=True)
class Outcome:
    """What became of one row over one parameter list.

    Attributes:
        listed: The parameter list.
        row: The row.
        reason: Why there are no numbers; None if there are.
        error: Distance to float64 in units of the row's bound; None if it never stepped.
        resident: Bytes per parameter that stay from step to step.
        peak_extra: Bytes per parameter that a step uses beyond, at its worst moment.
        launches: Kernels of one step; None on a CPU.
        host_reads: Values that the host reads in one step; None if they could not be counted.
        times: Seconds per step.
    """

    listed: ParameterList
    row: Row
    reason: str | None = None
    error: float | None = None
    resident: float | None = None
    peak_extra: float | None = None
    launches: int | None = None
    host_reads: int | None = None
    times: Times | None = None


@dataclass(frozen=True)
class BenchResult:
    """All outcomes, and what they were measured on.

    Attributes:
        settings: What was asked for.
        outcomes: In the order of lists and rows.
        copy_bandwidth: Bytes per second of a copy on the device.
        machine: Column name to value: date, device, CPU, versions.
    """

    settings: BenchSettings
    outcomes: tuple[Outcome, ...]
    copy_bandwidth: float
    machine: dict[str, str]

    def ratio(self, outcome: Outcome, to: str = BASELINE) -> float | None:
        """Returns the median over that of another row of the same list; None without both."""
        other = next(
            (o for o in self.outcomes if o.listed == outcome.listed and o.row.key == to), None
        )
        if other is None or other.times is None or outcome.times is None:
            return None
        return outcome.times.median / other.times.median


class Progress(Protocol):
    """What is told about a running experiment."""

    def begin(self, label: str, total: int) -> Callable[[int, str], None]:
        """A parameter list begins; what is returned hears how many of its stages are done."""


def run_bench(settings: BenchSettings, progress: Progress) -> BenchResult:
    """Measures every row over every parameter list; takes minutes for large ones.

    Args:
        settings: What to measure.
        progress: Told about every stage.

    Raises:
        ArgumentError: A row is unknown, the device is not there, or memory is too small.
    """
    rows = check_settings(settings)
    torch.set_num_threads(settings.threads)
    outcomes: list[Outcome] = []
    for listed in settings.lists:
        outcomes += _run_list(listed, rows, settings, progress)
        gc.collect()
    return BenchResult(
        settings, tuple(outcomes), copy_bandwidth(settings.device), machine(settings.device)
    )


def check_settings(settings: BenchSettings) -> tuple[Row, ...]:
    """Returns the rows to run, after all that can be found out before they do; no host sync.

    Args:
        settings: What to measure.

    Raises:
        ArgumentError: A row is unknown, the device is not there, or memory is too small.
    """
    rows = settings.chosen_rows()
    check_device(settings.device)
    for listed in settings.lists:
        check_memory(listed, rows, settings.device)
    return rows


def _run_list(
    listed: ParameterList, rows: Sequence[Row], settings: BenchSettings, progress: Progress
) -> list[Outcome]:
    running = [row for row in rows if row.missing is None]
    advance = progress.begin(listed.name, 2 * len(running) + settings.rounds)
    problem = make_problem(listed, settings.device)
    outcomes = {row.key: Outcome(listed, row, row.missing) for row in rows}
    built: dict[str, _Built] = {}
    for done, row in enumerate(running, 1):
        try:
            built[row.key] = _build(row, problem)
        except Exception as raised:  # whatever foreign code raises: the row says so, others go on
            reason = f"failed: {type(raised).__name__}: {' '.join(str(raised).split())[:200]}"
            outcomes[row.key] = Outcome(listed, row, reason)
        advance(done, row.label)
    judged = errors(problem, {key: (b.contender, b.row.bound) for key, b in built.items()})
    for done, (key, error) in enumerate(judged.items(), len(running) + 1):
        wrong = verdict(error, built[key].row.bound)
        outcomes[key] = replace(outcomes[key], error=error, reason=wrong)
        if wrong is None:
            outcomes[key] = _count(outcomes[key], built[key], problem)
        else:
            del built[key]
        advance(done, f"checked {outcomes[key].row.label}")
    times = time_rounds(
        problem,
        {key: b.contender for key, b in built.items()},
        settings.rounds,
        lambda done: advance(2 * len(running) + done, f"round {done}"),
    )
    return [replace(outcomes[row.key], times=times.get(row.key)) for row in rows]


@dataclass(frozen=True)
class _Built:
    row: Row
    contender: Contender
    kept: int  # bytes in use since it was built and has stepped


def _build(row: Row, problem: Problem) -> _Built:
    """Builds a row and takes the checked steps, which also warm it up."""
    made: list[Contender] = []

    def build_and_step() -> None:
        made.append(row.make(problem))
        checked_step(made[0], problem, 0)

    gc.collect()
    first = allocated(build_and_step, problem.device)
    for step in range(1, CHECKED_STEPS):
        checked_step(made[0], problem, step)
    return _Built(row, made[0], first.kept)


def _count(outcome: Outcome, built: _Built, problem: Problem) -> Outcome:
    """Adds what is counted, each in an untimed step of its own."""
    contender, device = built.contender, problem.device

    def ready() -> Contender:
        contender.before_step()
        problem.fill(contender.grads, 0, scaled=contender.scaled)
        synchronize(device)
        return contender

    gc.collect()
    named = storage_bytes(contender.held())
    step = allocated(ready().step, device)
    kernels = launches(ready().step, device)
    return replace(
        outcome,
        resident=named / problem.listed.count,
        # what a row keeps and does not show, such as scratch buffers, counts as extra
        peak_extra=(step.peak + max(0, built.kept - named)) / problem.listed.count,
        launches=kernels,
        host_reads=_host_reads(ready(), device),
    )


def _host_reads(contender: Contender, device: torch.device) -> int:
    if contender.compiled:
        return compiled_host_reads(contender.step)
    with HostReads(device, contender.on_host()) as reads:
        contender.step()
    count: int = reads.count
    return count


def check_device(device: torch.device) -> None:
    """Raises unless steps can run on `device`.

    Raises:
        ArgumentError: It is neither a CPU nor a CUDA device, or that one is not there.

    Example:
        >>> check_device(torch.device("cpu"))
    """
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available()):
        return
    raise ArgumentError(
        f"device: expected cpu or a CUDA device that PyTorch can use here, got {device}."
    )


def check_memory(listed: ParameterList, rows: Sequence[Row], device: torch.device) -> None:
    """Raises if the rows, which are all there at once, need more memory than is free.

    Raises:
        ArgumentError: They do.
    """
    free = free_bytes(device)
    shared = 4 + 4  # weights and gradients to start from, one widened at a time
    per_parameter = shared + sum(row.expected_bytes for row in rows if row.missing is None)
    needed = per_parameter * listed.count + 4 * 8 * max(math.prod(s) for s in listed.shapes)
    if free is not None and needed > free:
        raise ArgumentError(
            f"shapes: expected rows that fit into the {free / 2**30:.1f} GiB that are free, got "
            f"{listed.name}, which needs {needed / 2**30:.1f} GiB. Name fewer rows with --rows."
        )


def free_bytes(device: torch.device) -> int | None:
    """Returns the free memory of a device; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(encoding="ascii"), re.M)
    return None if found is None else int(found[1]) * 1024


def machine(device: torch.device) -> dict[str, str]:
    """Returns what a measurement must be read with: date, device, CPU, versions.

    Example:
        >>> machine(torch.device("cpu"))["device"]
        'cpu'
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    versions = find_versions(("mpcore", "torch", "triton"))
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": str(device),
        "gpu": gpu,
        "cpu": examine_cpu().name,
        "threads": str(torch.get_num_threads()),
        "torch_build": torch_build(),
        **{name: version or "" for name, version in versions.items()},
    }
