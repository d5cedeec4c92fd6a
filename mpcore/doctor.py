"""Which 16-bit format, loss scale and backend suit this machine; `mpcore doctor` shows it."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpcore.backends import resolve, why_not_triton
from mpcore.base import Cpu, Gpu, examine_cpu, find_gpus, find_versions, torch_build


@dataclass(frozen=True)
class Advice:
    """A choice and its reason."""

    choice: str
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """What `mpcore doctor` knows.

    Attributes:
        system: Operating system and architecture.
        versions: Version by package; None if it is not installed.
        torch_build: "CPU", "CUDA 12.8" or "ROCm 6.4".
        cpu: The CPU.
        gpus: Usable GPUs.
        number_format: Which 16-bit format to train in.
        loss_scale: Which loss scale goes with it.
        backend: Which backend `MixedPrecisionOptimizer` chooses for parameters that live here.
        triton: Whether the Triton kernels can run on this machine's best device, or why not.
    """

    system: str
    versions: dict[str, str | None]
    torch_build: str
    cpu: Cpu
    gpus: tuple[Gpu, ...]
    number_format: Advice
    loss_scale: Advice
    backend: Advice
    triton: str


def diagnose() -> Diagnosis:
    """Examines this machine; takes about a second and syncs with nothing.

    Example:
        >>> diagnosis = diagnose()
        >>> diagnosis.number_format.choice in {"bfloat16", "float16", "float32"}
        True
    """
    gpus = find_gpus()
    cpu = examine_cpu()
    device = torch.device("cuda" if gpus else "cpu")
    number_format = choose_format(gpus, cpu)
    why_not = why_not_triton([device])
    return Diagnosis(
        system=f"{platform.system()} {platform.machine()}",
        versions=find_versions(("mpcore", "torch", "triton")),
        torch_build=torch_build(),
        cpu=cpu,
        gpus=gpus,
        number_format=number_format,
        loss_scale=choose_loss_scale(number_format.choice),
        backend=choose_backend(device, why_not),
        triton=_triton(gpus, why_not),
    )


def _triton(gpus: Sequence[Gpu], why_not: str | None) -> str:
    if why_not is None:
        return "can run"
    installed = importlib.util.find_spec("triton") is not None
    reason = "there is no GPU for them" if installed and not gpus else why_not
    return f"cannot run: {reason}"


def choose_format(gpus: Sequence[Gpu], cpu: Cpu) -> Advice:
    """Recommends the number format to train in on the weakest of the GPUs, or on the CPU.

    Args:
        gpus: The GPUs, which all take part.
        cpu: Decides where there is no GPU.

    Example:
        >>> slow = {"float32": 1.0, "float16": 20.0, "bfloat16": 20.0}
        >>> choose_format((), Cpu("a CPU", 2, None, slow)).choice
        'float32'
    """
    if not gpus:
        return _choose_on_cpu(cpu)
    if all(gpu.bfloat16_products for gpu in gpus):
        return Advice(
            "bfloat16",
            "it multiplies as fast as float16 and reaches as far as float32, so no gradient "
            "overflows or vanishes; with 8 significant bits it needs FP32 masters. float16 has "
            "11, which can be worth its loss scale.",
        )
    if all(gpu.float16_products for gpu in gpus):
        weakest = next(gpu for gpu in gpus if not gpu.bfloat16_products)
        return Advice(
            "float16",
            f"{weakest.name} ({weakest.architecture}) multiplies float16 in hardware, bfloat16 "
            f"only by way of float32.",
        )
    weakest = next(gpu for gpu in gpus if not gpu.float16_products)
    return Advice(
        "float32",
        f"{weakest.name} ({weakest.architecture}) has no 16-bit matrix units; float16 would save "
        f"memory, not time.",
    )


def _choose_on_cpu(cpu: Cpu) -> Advice:
    seconds = cpu.product_seconds
    fastest = min(seconds, key=lambda name: seconds[name])
    ratio = seconds["float32"] / seconds["bfloat16"]
    # below 1.2 the casts around the products eat the gain
    if fastest == "bfloat16" and ratio > 1.2:
        return Advice(
            "bfloat16",
            f"this CPU multiplies it {ratio:.1f} times as fast as float32 (measured); "
            "with 8 significant bits it needs FP32 masters.",
        )
    return Advice(
        "float32",
        "there is no GPU, and this CPU gains too little from 16 bits (measured). To try 16-bit "
        "training here, use mpcore.emulate_tensor_cores(), which computes it as a GPU would.",
    )


def choose_loss_scale(number_format: str) -> Advice:
    """Recommends a loss scale for a number format.

    Example:
        >>> choose_loss_scale("float16").choice
        'DynamicLossScale()'
    """
    if number_format == "float16":
        return Advice(
            "DynamicLossScale()", "float16 ends at 6e-8, where small gradients would vanish."
        )
    return Advice("NoLossScale()", f"{number_format} has the range that gradients need.")


def choose_backend(device: torch.device, why_not: str | None) -> Advice:
    """Says which backend "auto" takes for parameters on a device, and why.

    Args:
        device: Where the parameters are.
        why_not: Why Triton cannot run there, None if it can.

    Example:
        >>> choose_backend(torch.device("cpu"), "there is no GPU").choice in ("compiled", "cpu")
        True
    """
    name, _ = resolve("auto", [device])
    if name == "triton":
        return Advice(name, "fused kernels run on this GPU.")
    if name == "compiled":
        return Advice(name, "its C library came with the package; one pass over memory.")
    if device.type == "cpu":
        return Advice(
            name,
            "no C library came with the package: PyTorch's own fused kernels, on blocks that stay "
            "in the cache.",
        )
    return Advice(name, f"{why_not}; plain PyTorch operations stand in.")
