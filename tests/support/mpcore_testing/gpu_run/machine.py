"""Part 1: versions, device, what Triton needs, and the first launch."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mpcore
import torch
from mpcore.base.machine import examine_cpu, find_versions, torch_build

from mpcore_testing.gpu_run.record import Recorder, Row
from mpcore_testing.gpu_run.setting import Setting

ROOT = Path(mpcore.__file__).resolve().parents[1]
_QUERY = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"


def run(record: Recorder, setting: Setting) -> None:
    """Notes what the results must be read with, then launches one kernel."""
    record.fact(**versions(), **source(), cpu=examine_cpu().name, cores=os.cpu_count())
    record.fact(c_compiler=c_compiler())
    if setting.on_a_gpu:
        record.row("device", lambda: _device(setting))
        record.row("driver", _driver)
    record.row("first launch", lambda: _launch(setting))


def versions() -> dict[str, Any]:
    """Python, packages, platform."""
    found = find_versions(("torch", "triton", "numpy"))
    return {**found, "torch_build": torch_build(), "platform": platform.platform()}


def source() -> dict[str, Any]:
    """Which code this is: commit where git tells it, and a digest of the files themselves."""
    digest = hashlib.sha256()
    for folder in (ROOT / "mpcore", ROOT / "kernels"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", "mpcore", "kernels")
    return {
        "mpcore": mpcore.__version__,
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed_since": None if changed is None else bool(changed),
        "digest": digest.hexdigest()[:16],
    }


def c_compiler() -> str | None:
    """The compiler that Triton builds its launcher with; None if it will find none."""
    chosen = os.environ.get("CC")
    names = [chosen] if chosen else ["gcc", "clang", "cc"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _device(setting: Setting) -> Row:
    found = torch.cuda.get_device_properties(setting.device)
    free, total = torch.cuda.mem_get_info(setting.device)
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory": total,
        "free": free,
        # an attribute of newer releases
        "l2_cache": getattr(found, "L2_cache_size", None),
        "count": torch.cuda.device_count(),
    }


def _driver() -> Row:
    told = _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader")
    first = (told or "").partition("\n")[0]
    values = [value.strip() for value in first.split(",")] if first else []
    return {"driver": dict(zip(_QUERY.split(","), values, strict=False)) or None}


def _launch(setting: Setting) -> Row:
    """The kernel that does the least, on three values."""
    import mpcore_kernels

    if setting.on_a_gpu and c_compiler() is None:
        raise RuntimeError(
            "expected a C compiler, got none: Triton builds the launcher of each kernel with one. "
            "Install gcc, or name one in the environment variable CC."
        )
    grad = torch.tensor([2.0, -4.0, 0.5], device=setting.device)
    flags = torch.zeros(1, dtype=torch.int32, device=setting.device)
    mpcore_kernels.unscale_([grad], setting.scalar(0.5), flags)
    if (grad.tolist(), flags.tolist()) != ([1.0, -2.0, 0.25], [0]):
        raise RuntimeError(f"expected [1.0, -2.0, 0.25] and flag 0, got {grad} and {flags}")
    return {"kernels": "interpreted" if not setting.on_a_gpu else "compiled"}
