"""`mpcore memory`: the table, printed."""

from __future__ import annotations

from rich.console import Console

from mpcore.bench.memory_table import memory_table
from mpcore.bench.shapes import parse
from mpcore.cli.output import show_table
from mpcore.errors import ArgumentError


def show_memory(size: str, *, ranks: int, moments: int, console: Console) -> None:
    """Prints what a model of some size takes.

    Args:
        size: A number of parameters, such as 124M, or gpt2.
        ranks: Over how many FSDP2 shards it.
        moments: Of the optimizer.
        console: Where to.

    Raises:
        ArgumentError: A number is none, or too small.
    """
    lists = parse(size)
    if len(lists) > 1:
        raise ArgumentError(f"size: expected one number of parameters such as 124M, got {size!r}.")
    show_table(memory_table(lists[0].count, ranks=ranks, moments=moments), console)
