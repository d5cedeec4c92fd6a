"""`mpcore memory`: the table, printed."""

from __future__ import annotations

from rich.console import Console

from mpcore.bench.memory_table import memory_sizes, memory_table
from mpcore.bench.shapes import parse
from mpcore.cli.json_view import to_json
from mpcore.cli.output import show_table
from mpcore.errors import ArgumentError


def show_memory(size: str, *, ranks: int, moments: int, console: Console | None) -> None:
    """Prints what a model of some size takes.

    Args:
        size: A number of parameters, such as 124M, or gpt2.
        ranks: Over how many FSDP2 shards it.
        moments: Of the optimizer.
        console: Where to; None prints JSON to standard output, all sizes in bytes.

    Raises:
        ArgumentError: A number is none, or too small.
    """
    lists = parse(size)
    if len(lists) > 1:
        raise ArgumentError(f"size: expected one number of parameters such as 124M, got {size!r}.")
    count = lists[0].count
    if console is not None:
        show_table(memory_table(count, ranks=ranks, moments=moments), console)
        return
    ways = [
        {**one.each._asdict(), **one._asdict(), "each": one.each.held}
        for one in memory_sizes(count, ranks=ranks, moments=moments)
    ]
    print(to_json({"parameters": count, "ranks": ranks, "ways": ways}))
