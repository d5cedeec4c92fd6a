"""Bytes allocated, kernels launched and values read by the host during one step.

On a CPU the bytes are those of the profiler's memory events: every allocation and release of
PyTorch's CPU allocator, also those inside of operations. On a GPU they are
`torch.cuda.max_memory_allocated`, and kernels are those that the profiler saw run.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from mpcore.bench.tensors import synchronize

# its beginning and end; memory that was there before it began, which is of no interest here
_PROFILER_LOG = (b"USDT:", b"allocated before the profiling started")
_READ = torch.ops.aten._local_scalar_dense.default


@dataclass(frozen=True)
class Allocated:
    """What a call did to memory.

    Attributes:
        peak: Most bytes in use during the call beyond those in use before.
        kept: Bytes in use after the call beyond those in use before.
    """

    peak: int
    kept: int


def allocated(call: Callable[[], object], device: torch.device) -> Allocated:
    """Runs `call` and returns what it allocated on `device`; syncs with the host.

    Example:
        >>> allocated(lambda: torch.ones(1000) + torch.ones(1000), torch.device("cpu"))
        Allocated(peak=12000, kept=0)
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return Allocated(peak - before, torch.cuda.memory_allocated(device) - before)
    peak = in_use = 0
    for event in _trace(call, [ProfilerActivity.CPU], memory=True):
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0:
            in_use += event["args"]["Bytes"]
            peak = max(peak, in_use)
    return Allocated(peak, in_use)


def launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Runs `call` and returns how many kernels ran on the GPU; None on a CPU, which has none."""
    if device.type != "cuda":
        return None

    def finished() -> None:
        call()
        synchronize(device)

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    events = _trace(finished, activities, memory=False)
    return len([event for event in events if event.get("cat") == "kernel"])


def _trace(
    call: Callable[[], object], activities: list[ProfilerActivity], *, memory: bool
) -> list[dict[str, Any]]:
    """Returns the events of the profiler's trace, in the order of time."""
    with (
        _without_profiler_log(),
        profile(activities=activities, profile_memory=memory) as profiled,
    ):
        call()
    with tempfile.TemporaryDirectory(prefix="mpcore-bench-") as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return sorted((e for e in events if "ts" in e), key=lambda e: float(e["ts"]))


@contextmanager
def _without_profiler_log() -> Iterator[None]:
    """Drops the lines that the profiler's native library writes to standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            log.seek(0)
            others = [line for line in log if not any(mark in line for mark in _PROFILER_LOG)]
            sys.stderr.write(b"".join(others).decode(errors="replace"))


def compiled_host_reads(call: Callable[[], object]) -> int:
    """Runs `call` and returns how many values the host read, for steps that are compiled.

    Compiled code refuses to run under `HostReads`. Here tensors of all devices count.

    Example:
        >>> compiled_host_reads(lambda: torch.ones(()).item())
        1
    """
    events = _trace(call, [ProfilerActivity.CPU], memory=False)
    return sum(event.get("name") == "aten::_local_scalar_dense" for event in events)


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts values that the host reads from tensors: `aten::_local_scalar_dense`.

    Args:
        device: Where the step runs. Reads of tensors elsewhere wait for nothing.
        known: Tensors that live on the host whatever the device, such as the step counts of torch's
            optimizers that are neither fused nor capturable.

    Attributes:
        count: How many there were.

    Example:
        >>> with HostReads(torch.device("cpu"), []) as reads:
        ...     value = torch.ones(()).item()
        >>> reads.count
        1
    """

    def __init__(self, device: torch.device, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self._device = device.type
        self._known = {tensor.data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _READ and args[0].device.type == self._device:
            self.count += args[0].data_ptr() not in self._known
        return func(*args, **(kwargs or {}))
