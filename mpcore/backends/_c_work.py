"""What the passes in C work on: tables of addresses, chunks, and the threads that share them."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from threading import Thread
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mpcore.backends._blocks import memory_order
from mpcore.base import GradientSet
from mpcore.errors import ArgumentError

#: Elements that a thread takes at a time.
CHUNK = 2**16
#: What `count_values` writes for each chunk: counts by exponent, zeros, bits of the largest.
COUNTS = 258
#: What C calls dtypes.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# below this, waking other threads takes longer than the work
_WORTH_A_THREAD = 2**17


@dataclass(frozen=True)
class Table:
    """Where tensors lie in memory, and how they are cut.

    Attributes:
        flat: The tensors as they lie in memory, one role after the other; kept alive.
        addresses: Where each lies.
        count: How many there are of each role.
        cut: How.
    """

    flat: list[Tensor]
    addresses: array[int]
    count: int
    cut: Cut

    @staticmethod
    def of(roles: Sequence[Sequence[Tensor]], rows: Sequence[int] = ()) -> Table:
        """Returns the table of tensors; those of one index have one layout in all roles.

        Args:
            roles: A list for each.
            rows: Elements of a row of each tensor, where blocks begin anew at rows.
        """
        flat = [memory_order(tensor) for role in roles for tensor in role]
        count = len(roles[0])
        sizes = [tensor.numel() for tensor in flat[:count]]
        cut = cut_rows(sizes, rows) if rows else cut_chunks(sizes)
        return Table(flat, addresses_of(flat), count, cut)


def addresses_of(tensors: Sequence[Tensor]) -> array[int]:
    """Returns where tensors lie in memory, as C has an array of pointers.

    Raises:
        ArgumentError: The address of one is not where its values are.
    """
    known = GradientSet.of(tensors)
    if not known.are_in_memory:
        raise ArgumentError(
            "tensors: expected memory of their own, got a DTensor, a wrapper, a meta tensor "
            "or freed memory, put into optimizer.state or a parameter. Put the values there."
        )
    return known.pointers


class Cut(NamedTuple):
    """How tensors are cut.

    Attributes:
        chunks: int64 `[chunks, 3]`: tensor, first element, end. To be read only.
        elements: Of all tensors together.
    """

    chunks: Tensor
    elements: int


def cut_chunks(sizes: Sequence[int]) -> Cut:
    """Returns how tensors of these sizes are cut.

    Example:
        >>> cut_chunks([5, 0, 2**16 + 1]).chunks.tolist()
        [[0, 0, 5], [2, 0, 65536], [2, 65536, 65537]]
    """
    return _cut(tuple(sizes))


@lru_cache(maxsize=16)  # of a model they are the same at every step
def _cut(sizes: tuple[int, ...]) -> Cut:
    size = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    pieces = (size + CHUNK - 1) // CHUNK
    tensor = torch.repeat_interleave(torch.arange(len(size), device="cpu"), pieces)
    first = torch.cumsum(pieces, 0) - pieces
    start = (torch.arange(len(tensor), device="cpu") - first[tensor]) * CHUNK
    chunks = torch.stack([tensor, start, torch.minimum(start + CHUNK, size[tensor])], dim=1)
    return Cut(chunks.contiguous(), sum(sizes))


def cut_rows(sizes: Sequence[int], rows: Sequence[int]) -> Cut:
    """Returns how tensors are cut where rows begin alone, or multiples of CHUNK into a long row.

    Args:
        sizes: Elements of each tensor.
        rows: Elements of a row of each, at least 1.

    Example:
        >>> cut_rows([2**16 + 10], [2**15 + 5]).chunks.tolist()
        [[0, 0, 32773], [0, 32773, 65546]]
        >>> cut_rows([2**17 + 600], [2**16 + 300]).chunks[:3].tolist()
        [[0, 0, 65536], [0, 65536, 65836], [0, 65836, 131372]]
        >>> cut_rows([0, 6], [3, 3]).chunks.tolist()  # nothing of an empty one
        [[1, 0, 6]]
    """
    chunks = []
    for index, (size, row) in enumerate(zip(sizes, rows, strict=True)):
        many = CHUNK // row * row
        if many:
            starts = list(range(0, size, many))
        else:
            starts = [first + at for first in range(0, size, row) for at in range(0, row, CHUNK)]
        ends = [*starts[1:], size] if starts else []  # an empty tensor has no chunk
        chunks += [(index, *pair) for pair in zip(starts, ends, strict=True)]
    table = torch.tensor(chunks, dtype=torch.int64, device="cpu").view(-1, 3)
    return Cut(table, sum(sizes))


def by_dtype(flat: Sequence[Tensor], cut: Cut) -> list[tuple[torch.dtype, Cut, array[int]]]:
    """Returns for each dtype the chunks of its tensors, and the addresses of all tensors."""
    flat = GradientSet.of(flat)
    if len(flat.dtypes) == 1:
        return [(next(iter(flat.dtypes)), cut, addresses_of(flat))]
    parts = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in flat):
        mask = torch.tensor([tensor.dtype == dtype for tensor in flat], device="cpu")
        chunks = cut.chunks[mask[cut.chunks[:, 0]]].contiguous()
        elements = sum(tensor.numel() for tensor in flat if tensor.dtype == dtype)
        parts.append((dtype, Cut(chunks, elements), addresses_of(flat)))
    return parts


class Work(ctypes.Structure):
    """`work_t` of `_passes.c`: what the threads of one pass share."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("next", "count")),
        *((name, ctypes.c_void_p) for name in ("chunks", "grads", "sums", "counts")),
        *((name, ctypes.c_void_p) for name in ("masters", "moments", "scales")),
        *((name, ctypes.c_void_p) for name in ("weights", "scalars", "saturated", "edits")),
        *((name, ctypes.c_void_p) for name in ("draws", "offsets", "rows")),
        ("tensors", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("step", "grad_dtype", "weight_dtype", "store")),
        ("moment_stores", ctypes.c_int32 * 3),
        ("words", ctypes.c_int32),
        ("coefficient", ctypes.c_float),
        ("streaming", ctypes.c_int32),
    ]

    def take_up(self, dtype: torch.dtype, cut: Cut, grads: array[int]) -> None:
        """Makes some chunks the work.

        Args:
            dtype: Of their gradients.
            cut: The chunks.
            grads: The gradients' addresses; what they point to has to stay alive.
        """
        self.grad_dtype = DTYPES[dtype]
        self.next, self.count = 0, cut.chunks.shape[0]
        self.chunks, self.grads = cut.chunks.data_ptr(), grads.buffer_info()[0]
        self.elements = cut.elements
        self._chunks_and_grads = (cut.chunks, grads)

    def keep(self, *memory: Tensor | array[int]) -> None:
        """Keeps memory alive as long as its addresses are in here."""
        self._kept = memory


class Shared(Protocol):
    """A structure of C that threads share, and how many elements they have to do."""

    elements: int


def run(function: Any, work: Shared) -> None:
    """Runs a pass on as many threads as torch uses: its own, if they can be had."""
    argument = ctypes.byref(work)  # type: ignore[arg-type]
    threads = torch.get_num_threads() if work.elements >= _WORTH_A_THREAD else 1
    if threads == 1:
        function(argument)
        return
    team = _openmp()
    if team is not None:
        team(function, argument, threads, 0)
        return
    others = [Thread(target=function, args=(argument,)) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    function(argument)  # ctypes releases the interpreter's lock
    for thread in others:
        thread.join()


@cache
def _openmp() -> Callable[..., None] | None:
    """Returns what starts the threads of the OpenMP that torch has loaded, or None.

    They wait for work by spinning for a while after each operation of torch: threads of our own
    would have to share the cores with them.
    """
    team: Callable[..., None] | None = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return team
