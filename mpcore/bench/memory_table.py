"""`mpcore memory`: what weights, gradients, masters and moments of a model's size take.

Counted from the dtypes of what lies in memory between `backward` and `zero_grad`; activations, step
counts and what an allocator rounds up are left out. `mpcore bench --train` counts a real step.
"""

from __future__ import annotations

from typing import NamedTuple

from mpcore.base import Table
from mpcore.errors import ArgumentError
from mpcore.stores import BLOCK, MASTER_STORES

_GIB = 2**30
#: Of a moment in each store; 8-bit ones in rows that fill their blocks.
_MOMENTS = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / BLOCK}
#: The ways to keep masters and moments.
_WAYS = (
    ("float32", "float32"),
    *(("split", moments) for moments in _MOMENTS),
    *(("none", moments) for moments in ("bfloat16", "int8")),
)


class Bytes(NamedTuple):
    """Bytes of one parameter.

    Attributes:
        label: What is kept how.
        weight: Of what the model computes with.
        gradient: Of its gradient.
        master: Of what lies beside the weight.
        moments: Of the optimizer's state.
        saved: Of the master and the moments in `state_dict()`.
    """

    label: str
    weight: int
    gradient: int
    master: int
    moments: float
    saved: int

    @property
    def held(self) -> float:
        """All that stays in memory."""
        return self.weight + self.gradient + self.master + self.moments

    def file(self, *, compact: bool) -> float:
        """Of a checkpoint: weights, masters and moments."""
        return self.weight + (self.master + self.moments if compact else self.saved)


def memory_rows(moments: int) -> tuple[Bytes, ...]:
    """Returns the ways to keep a parameter, FP32 first.

    Args:
        moments: How many the optimizer has.

    Example:
        >>> [row.held for row in memory_rows(2)]
        [16, 16.0, 14.0, 10.0, 8.03125, 8.0, 6.03125]
    """
    wide = 4 * moments
    rows = [Bytes("FP32", 4, 4, 0, wide, saved=wide)]
    for masters, kept in _WAYS:
        beside, state = MASTER_STORES[masters].bytes_per_element, _MOMENTS[kept] * moments
        label = f'16 bits, masters="{masters}"'
        label += "" if kept == "float32" else f', moments="{kept}"'
        rows.append(Bytes(label, 2, 2, beside, state, saved=4 + wide))
    return tuple(rows)


class Sizes(NamedTuple):
    """Bytes of a model.

    Attributes:
        each: Of one parameter.
        held: On each rank, in memory.
        saved: Of a checkpoint of all ranks.
        saved_compact: Of one from `state_dict(compact=True)`.
    """

    each: Bytes
    held: int
    saved: int
    saved_compact: int


def memory_sizes(parameters: int, *, ranks: int = 1, moments: int = 2) -> tuple[Sizes, ...]:
    """Returns what a model takes in each way, FP32 first.

    Args:
        parameters: Of the model.
        ranks: Over how many ranks FSDP2 shards them.
        moments: Tensors of the parameters' size in the optimizer's state: 2 for AdamW, 3 with
            AMSGrad, 1 for Lion, Adagrad and SGD with momentum, 0 for SGD without.

    Raises:
        ArgumentError: A number is too small.

    Example:
        >>> memory_sizes(1000, ranks=4)[0][1:]  # FP32: held by each rank, saved, saved compact
        (4000, 12000, 12000)
    """
    for name, value, least in (("ranks", ranks, 1), ("moments", moments, 0)):
        if value < least:
            raise ArgumentError(f"{name}: expected at least {least}, got {value}.")
    here = -(-parameters // ranks)
    return tuple(
        Sizes(
            row,
            held=round(row.held * here),
            saved=round(row.file(compact=False) * parameters),
            saved_compact=round(row.file(compact=True) * parameters),
        )
        for row in memory_rows(moments)
    )


def memory_table(parameters: int, *, ranks: int = 1, moments: int = 2) -> Table:
    """Returns the table of `memory_sizes`; no host sync."""
    sizes = memory_sizes(parameters, ranks=ranks, moments=moments)

    def cells(size: Sizes) -> tuple[str, ...]:
        row = size.each
        parts = (row.weight, row.gradient, row.master, row.moments, row.held)
        return (
            row.label,
            *(f"{part:.4g}" for part in parts),
            *(f"{whole / _GIB:.2f}" for whole in size[1:]),
        )

    shared = "" if ranks == 1 else f", held on each of {ranks} ranks"
    return Table(
        title=f"Bytes of a parameter, and GiB of {parameters:,}{shared}",
        header=(
            *("Kept as", "Weight", "Gradient", "Master", "Moments", "All"),
            *("GiB held", "GiB saved", "GiB saved compact"),
        ),
        rows=tuple(map(cells, sizes)),
        notes=(
            "Master: what lies beside the 16-bit weight: float32, an int16 remainder, or nothing. "
            "Saved: weights, masters and moments of all ranks; compact: state_dict(compact=True).",
            "8-bit moments: 4 bytes of scales for 256 numbers of a row; rows of fewer than 64, and "
            'parameters of one dimension, keep bfloat16 moments. masters="none" is for bfloat16.',
            "Activations, buffers and what a step needs besides are not in here. The general path "
            "gives split masters 4 more bytes a parameter while the wrapped optimizer steps.",
        ),
    )
