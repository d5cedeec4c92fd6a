"""`mpcore doctor` on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mpcore.base import Cpu, Gpu
from mpcore.doctor import Advice, Diagnosis


def show_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Prints a diagnosis.

    Args:
        diagnosis: What to print.
        console: Where.
    """
    _section(console, "This machine", _machine_rows(diagnosis))
    _section(
        console,
        "Advice",
        [
            ("16-bit format", _advice(diagnosis.number_format)),
            ("Loss scale", _advice(diagnosis.loss_scale)),
            ("Backend", _advice(diagnosis.backend)),
        ],
    )


def _machine_rows(diagnosis: Diagnosis) -> list[tuple[str, str | Text]]:
    versions = diagnosis.versions
    rows: list[tuple[str, str | Text]] = [
        ("System", f"{diagnosis.system}, Python {versions['python']}"),
        ("mpcore", versions["mpcore"] or "run from source, not installed"),
        ("PyTorch", f"{versions['torch']} (built for {diagnosis.torch_build})"),
        ("Triton", f"{versions['triton'] or 'not installed'}; kernels {diagnosis.triton}"),
        ("CPU", f"{diagnosis.cpu.name}, threads: {diagnosis.cpu.threads}"),
        ("CPU flags", _flags(diagnosis.cpu)),
        ("CPU products", _products(diagnosis.cpu)),
    ]
    if not diagnosis.gpus:
        rows.append(("GPU", "none that PyTorch can use"))
    rows += [(f"GPU {index}", _gpu(gpu)) for index, gpu in enumerate(diagnosis.gpus)]
    return rows


def _flags(cpu: Cpu) -> str:
    if cpu.flags is None:
        return "not known on this system"
    return " ".join(cpu.flags) or "none for 16-bit numbers"


def _products(cpu: Cpu) -> str:
    times = (f"{name} {seconds * 1e6:,.0f} µs" for name, seconds in cpu.product_seconds.items())
    return "256 x 256 x 256: " + ", ".join(times)


def _gpu(gpu: Gpu) -> str:
    formats = {"float16": gpu.float16_products, "bfloat16": gpu.bfloat16_products}
    in_hardware = " and ".join(name for name, present in formats.items() if present) or "neither"
    return (
        f"{gpu.name}, {gpu.kind} {gpu.architecture} (capability {gpu.capability}), "
        f"{gpu.memory_gib:g} GiB; 16-bit products in hardware: {in_hardware}"
    )


def _advice(advice: Advice) -> Text:
    return Text.assemble((advice.choice, "bold green"), ": ", advice.reason)


def _section(console: Console, title: str, rows: list[tuple[str, str | Text]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value if isinstance(value, Text) else Text(value))
    console.print(Text(title, style="bold"))
    console.print(Padding(table, (0, 0, 1, 2)))
