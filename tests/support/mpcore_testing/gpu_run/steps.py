"""Part 4: the optimizer step beside torch's, checked against float64 before anything is timed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mpcore.bench.check import CHECKED_STEPS, checked_step, errors, verdict
from mpcore.bench.contenders import Contender
from mpcore.bench.counting import HostReads, allocated, launches
from mpcore.bench.experiment import free_bytes
from mpcore.bench.problem import Problem, make_problem
from mpcore.bench.rows import Row as BenchRow
from mpcore.bench.rows import own_rows
from mpcore.bench.shapes import ParameterList, parse
from mpcore.bench.tensors import synchronize
from mpcore.bench.timing import copy_bandwidth, time_call, time_rounds
from mpcore.monitoring.memory import storage_bytes

from mpcore_testing.gpu_run.record import Recorder, Row, described
from mpcore_testing.gpu_run.setting import Setting

KEYS = ("fused", "amp-fused", "amp-foreach", "masters-loop", "general")
#: float32 elements of the copy that bandwidth is measured with: 256 MiB, or next to nothing
_COPIED = {True: 2**26, False: 2**10}
#: some 20 ms of a GPU
_BUSY_CYCLES = 40_000_000
#: bytes per parameter that steps allocate and release, of which foreach needs most
_TEMPORARY = 8


def run(record: Recorder, setting: Setting) -> None:
    """Measures every row over each parameter list, all rows of a list at once."""
    count = _COPIED[setting.on_a_gpu]
    record.row(
        "copy", lambda: {"bytes_per_second": copy_bandwidth(setting.device, count), "floats": count}
    )
    for text in setting.sizes.lists:
        (listed,) = parse(text)
        _run_list(record, setting, listed)
        gc.collect()
        if setting.on_a_gpu:
            torch.cuda.empty_cache()


@dataclass
class _Built:
    row: BenchRow
    contender: Contender


def _run_list(record: Recorder, setting: Setting, listed: ParameterList) -> None:
    rows = [row for row in own_rows(torch.float16, "triton", setting.device) if row.key in KEYS]
    rows.sort(key=lambda row: KEYS.index(row.key))
    title = f"{listed.name}: "
    if record.left <= 0:
        record.skip(f"{title}{row.label}" for row in rows)
        return
    problem = make_problem(listed, setting.device)
    built: dict[str, _Built] = {}
    for row in rows:
        record.row(f"{title}{row.label}, build", lambda r=row: _build(r, problem, built))
    record.row(f"{title}check", lambda: _check(problem, built))
    if not built:
        return
    record.row(f"{title}times", lambda: _times(setting, problem, built))
    record.row(f"{title}queued", lambda: _queued(setting, problem, built))
    record.row(f"{title}host", lambda: _host(setting, problem, built))
    for key, found in built.items():
        # last: what profiles and counts may slow down what comes after
        record.row(f"{title}{key}, counts", lambda f=found: _counts(f, problem))


def _build(row: BenchRow, problem: Problem, built: dict[str, _Built]) -> Row:
    """Builds a row and takes the checked steps, which also compile what it needs."""
    free = free_bytes(problem.device)
    needed = (row.expected_bytes + _TEMPORARY) * problem.listed.count
    if free is not None and needed > free:
        gib = (needed / 2**30, free / 2**30)
        return {"key": row.key, "does_not_fit": "needs {:.0f} GiB of {:.0f} GiB free".format(*gib)}
    contender = row.make(problem)
    for step in range(CHECKED_STEPS):
        checked_step(contender, problem, step)
    synchronize(problem.device)
    built[row.key] = _Built(row, contender)
    return {"key": row.key}


def _check(problem: Problem, built: dict[str, _Built]) -> Row:
    """Compares with float64; rows that are wrong are dropped and not timed."""
    found = errors(problem, {key: (b.contender, b.row.bound) for key, b in built.items()})
    wrong = {key: verdict(error, built[key].row.bound) for key, error in found.items()}
    for key, reason in wrong.items():
        if reason is not None:
            del built[key]
    return {"list": problem.listed.name, "in_bounds": found, "wrong": wrong}


def _times(setting: Setting, problem: Problem, built: dict[str, _Built]) -> Row:
    contenders = {key: found.contender for key, found in built.items()}
    taken = time_rounds(problem, contenders, setting.sizes.rounds, lambda done: None)
    measured: dict[str, Any] = {}
    for key, times in taken.items():
        low, middle, high = times.quartiles
        moved = built[key].row.traffic.total
        measured[key] = {
            "label": built[key].row.label,
            "regime": built[key].row.regime,
            "median_s": middle,
            "lower_s": low,
            "upper_s": high,
            "moved_bytes_per_parameter": moved,
        }
    listed = problem.listed
    return {
        "list": listed.name,
        "parameters": listed.count,
        "tensors": len(listed.shapes),
        "rounds": setting.sizes.rounds,
        "times": measured,
    }


def _queued(setting: Setting, problem: Problem, built: dict[str, _Built]) -> Row:
    """Medians of steps that are launched while the device is busy: the host is not waited for.

    So it is in training, where the backward pass is still running when the step is launched. A step
    that reads a value on the host waits all the same, and its time shows it.
    """
    taken: dict[str, list[float]] = {key: [] for key in built}
    for _ in range(setting.sizes.rounds):
        for key, found in built.items():
            taken[key].append(queued(_ready(found, problem).step, problem.device))
    medians = {key: statistics.median(values) for key, values in taken.items()}
    return {"list": problem.listed.name, "queued_s": medians}


def queued(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call behind other work of the device; on a CPU there is no behind."""
    if device.type != "cuda":
        return time_call(call, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_BUSY_CYCLES)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def _ready(found: _Built, problem: Problem) -> Contender:
    contender = found.contender
    contender.before_step()
    problem.fill(contender.grads, 0, scaled=contender.scaled)
    synchronize(problem.device)
    return contender


def _host(setting: Setting, problem: Problem, built: dict[str, _Built]) -> Row:
    """Seconds until `step` returns, whether or not the device is done: medians."""
    taken: dict[str, list[float]] = {key: [] for key in built}
    for _ in range(setting.sizes.rounds):
        for key, found in built.items():
            step = _ready(found, problem).step
            gc.disable()
            started = time.perf_counter()
            step()
            taken[key].append(time.perf_counter() - started)
            gc.enable()
            synchronize(problem.device)
    medians = {key: statistics.median(values) for key, values in taken.items()}
    return {"list": problem.listed.name, "host_s": medians}


def _counts(found: _Built, problem: Problem) -> Row:
    """Bytes, values read by the host, kernels: each in a step of its own, each guarded."""
    device = problem.device
    counted: Row = {"list": problem.listed.name, "key": found.row.key}
    counted["resident_bytes"] = storage_bytes(found.contender.held())
    counted["extra_bytes"] = allocated(_ready(found, problem).step, device).peak
    step = _ready(found, problem).step
    with HostReads(device, found.contender.on_host()) as reads:
        step()
    counted["host_reads"] = reads.count
    try:
        # none seen of what surely was launched: the profiler sees nothing here
        counted["launches"] = launches(_ready(found, problem).step, device) or None
    except Exception as raised:  # profilers need rights that not every machine grants
        counted |= {"launches": None, "why_no_launches": described(raised)["error"]}
    return counted
