"""What this machine is made of: versions, CPU, GPUs.

Throughput facts: NVIDIA, "CUDA C++ Programming Guide", "Arithmetic Instructions": FP16 matrix
products in hardware since compute capability 7.0, BF16 ones since 8.0.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# what Linux calls the instructions that matter here, on x86 and on Arm
_CPU_FLAGS = (
    "avx2",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_fp16",
    "asimdhp",
    "bf16",
    "sve",
)
_PRODUCT_SIZE = 256
_ROUNDS = 6  # over which a product's best time is taken


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: What its driver calls it.
        kind: "cuda" or "rocm".
        capability: Compute capability, such as "9.0"; on ROCm, what PyTorch reports in its place.
        architecture: "sm_90" or "gfx942".
        memory_gib: Memory in GiB.
        float16_products: Whether matrix products of FP16 run in hardware.
        bfloat16_products: The same for BF16.
    """

    name: str
    kind: str
    capability: str
    architecture: str
    memory_gib: float
    float16_products: bool
    bfloat16_products: bool


@dataclass(frozen=True)
class Cpu:
    """The CPU.

    Attributes:
        name: Its model, or the architecture where the system does not tell.
        threads: Threads that PyTorch uses.
        flags: Instruction sets for vectors and 16-bit numbers; None where the system does not tell.
        product_seconds: Time of one 256 x 256 x 256 matrix product by dtype, measured.
    """

    name: str
    threads: int
    flags: tuple[str, ...] | None
    product_seconds: dict[str, float]


def find_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Returns the version of Python and of each package, None where one is not installed.

    Example:
        >>> find_versions(["no-such-package"])["no-such-package"] is None
        True
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def torch_build() -> str:
    """Names the platform that PyTorch was built for.

    Example:
        >>> torch_build().split()[0] in {"CPU", "CUDA", "ROCm"}
        True
    """
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return "CPU"


def find_gpus() -> tuple[Gpu, ...]:
    """Lists the GPUs that PyTorch can use.

    Example:
        >>> all(gpu.kind in {"cuda", "rocm"} for gpu in find_gpus())
        True
    """
    if not torch.cuda.is_available():
        return ()
    kind = "cuda" if torch.version.hip is None else "rocm"
    return tuple(_examine_gpu(index, kind) for index in range(torch.cuda.device_count()))


def _examine_gpu(index: int, kind: str) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    major, minor = properties.major, properties.minor
    architecture = f"sm_{major}{minor}"
    if kind == "rocm":
        architecture = properties.gcnArchName.split(":")[0]
    # every ROCm device that PyTorch supports (MI100, RDNA3 and later) multiplies both in hardware
    return Gpu(
        name=properties.name,
        kind=kind,
        capability=f"{major}.{minor}",
        architecture=architecture,
        memory_gib=round(properties.total_memory / 2**30, 1),
        float16_products=kind == "rocm" or major >= 7,
        bfloat16_products=kind == "rocm" or major >= 8,
    )


def examine_cpu() -> Cpu:
    """Examines the CPU and times a small matrix product of each dtype, the best of thirty.

    Example:
        >>> sorted(examine_cpu().product_seconds)
        ['bfloat16', 'float16', 'float32']
    """
    text = _cpuinfo()
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return Cpu(
        name=cpu_name(),
        threads=torch.get_num_threads(),
        flags=cpu_flags(text),
        product_seconds=time_products(dtypes),
    )


def cpu_name() -> str:
    """Returns the model of the CPU, or its architecture where the system does not tell.

    Example:
        >>> cpu_name() != ""
        True
    """
    return _field(_cpuinfo(), "model name") or platform.processor() or platform.machine()


def _cpuinfo() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text(errors="replace") if info.is_file() else ""


def time_products(dtypes: Mapping[str, torch.dtype]) -> dict[str, float]:
    """Times a matrix product of each dtype in turn, several times over; the best of each.

    In turn, so that what else the machine does for a moment hits no dtype alone.

    Args:
        dtypes: By name.

    Example:
        >>> [*time_products({"float32": torch.float32})]
        ['float32']
    """
    rounds = [{name: time_product(dtype) for name, dtype in dtypes.items()} for _ in range(_ROUNDS)]
    return {name: min(times[name] for times in rounds) for name in dtypes}


def cpu_flags(cpuinfo: str) -> tuple[str, ...] | None:
    """Picks the flags that matter out of the text of `/proc/cpuinfo`.

    Args:
        cpuinfo: The text; empty on systems without that file.

    Returns:
        The flags that are there, or None if the text lists none at all.

    Example:
        >>> cpu_flags("flags : fpu avx2 avx512_bf16")
        ('avx2', 'avx512_bf16')
    """
    line = _field(cpuinfo, "flags") or _field(cpuinfo, "Features")
    if line is None:
        return None
    present = set(line.split())
    return tuple(flag for flag in _CPU_FLAGS if flag in present)


def _field(text: str, name: str) -> str | None:
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator and key.strip() == name:
            return value.strip()
    return None


def time_product(dtype: torch.dtype) -> float:
    """Times a 256 x 256 x 256 matrix product on the CPU: the best of five, in seconds.

    Example:
        >>> time_product(torch.float32) > 0
        True
    """
    a = torch.full((_PRODUCT_SIZE, _PRODUCT_SIZE), 0.5, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return best
