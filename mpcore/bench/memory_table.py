"""`mpcore memory`: what weights, gradients, masters and moments of a model's size take.

Counted from the dtypes of what lies in memory between `backward` and `zero_grad`; activations, step
counts and what an allocator rounds up are left out. `mpcore bench --train` counts a real step.
"""

from __future__ import annotations

from typing import NamedTuple

from mpcore.base import Table
from mpcore.errors import ArgumentError
from mpcore.stores import MASTER_STORES

_GIB = 2**30
_MOMENT = 4


class Bytes(NamedTuple):
    """Bytes of one parameter.

    Attributes:
        label: What is kept how.
        weight: Of what the model computes with.
        gradient: Of its gradient.
        master: Of what lies beside the weight.
        moments: Of the optimizer's state.
        compact: Of what lies beside the weight in `state_dict(compact=True)`.
        saved: Of the master in `state_dict()`.
    """

    label: str
    weight: int
    gradient: int
    master: int
    moments: int
    compact: int
    saved: int

    @property
    def held(self) -> int:
        """All that stays in memory."""
        return self.weight + self.gradient + self.master + self.moments

    def file(self, *, compact: bool) -> int:
        """Of a checkpoint: weights, masters and moments."""
        return self.weight + self.moments + (self.compact if compact else self.saved)


def memory_rows(moments: int) -> tuple[Bytes, ...]:
    """Returns the ways to keep a parameter, FP32 first.

    Args:
        moments: How many the optimizer has.

    Example:
        >>> [(row.label, row.held) for row in memory_rows(2)]
        [('FP32', 16), ('16 bits, masters="float32"', 16), ('16 bits, masters="split"', 14)]
    """
    state = _MOMENT * moments
    rows = [Bytes("FP32", 4, 4, 0, state, compact=0, saved=0)]
    for name in ("float32", "split"):
        beside = MASTER_STORES[name].bytes_per_element
        label = f'16 bits, masters="{name}"'
        rows.append(Bytes(label, 2, 2, beside, state, compact=beside, saved=4))
    return tuple(rows)


def memory_table(parameters: int, *, ranks: int = 1, moments: int = 2) -> Table:
    """Returns the table of bytes for a number of parameters; no host sync.

    Args:
        parameters: Of the model.
        ranks: Over how many ranks FSDP2 shards them.
        moments: Tensors of the parameters' size in the optimizer's state: 2 for AdamW, 3 with
            AMSGrad, 1 for Lion, Adagrad and SGD with momentum, 0 for SGD without.

    Raises:
        ArgumentError: A number is too small.
    """
    for name, value, least in (("ranks", ranks, 1), ("moments", moments, 0)):
        if value < least:
            raise ArgumentError(f"{name}: expected at least {least}, got {value}.")
    here = -(-parameters // ranks)

    def cells(row: Bytes) -> tuple[str, ...]:
        parts = (row.weight, row.gradient, row.master, row.moments, row.held)
        files = [row.file(compact=compact) for compact in (False, True)]
        sizes = (row.held * here, files[0] * parameters, files[1] * parameters)
        return (row.label, *map(str, parts), *(f"{size / _GIB:.2f}" for size in sizes))

    shared = "" if ranks == 1 else f", held on each of {ranks} ranks"
    return Table(
        title=f"Bytes of a parameter, and GiB of {parameters:,}{shared}",
        header=(
            *("Kept as", "Weight", "Gradient", "Master", "Moments", "All"),
            *("GiB held", "GiB saved", "GiB saved compact"),
        ),
        rows=tuple(map(cells, memory_rows(moments))),
        notes=(
            "Master: what lies beside the 16-bit weight, float32 or an int16 remainder. Saved: "
            "weights, masters and moments of all ranks; compact: state_dict(compact=True).",
            "Activations, buffers and what a step needs besides are not in here. The general path "
            "gives split masters 4 more bytes a parameter while the wrapped optimizer steps.",
        ),
    )
