"""Many tensors, one launch: the table of addresses that a kernel walks.

A launch covers all tensors of one combination of dtypes, whatever their number. Each tensor is cut
into chunks of `CHUNK` elements, each chunk is one program, and two int64 tables on the device tell
a program what its chunk is:

    owners[program]  -> entry of the tensor that the chunk belongs to
    entries[entry]   -> source address, destination address, elements, first program, index

`index` is the tensor's place in the caller's list (a group holds only some of them). Offsets are
int64 throughout: a tensor may hold more than 2^31 elements. Zero-sized tensors have no chunk.

Chunks start at multiples of `CHUNK` elements from the start of their tensor, so a chunk is as
aligned as its tensor. Most tensors come from an allocator that aligns to 16 bytes or more; a view
may start at any element. The kernels therefore look at the addresses before they promise an
alignment to the compiler (`is_aligned`).

Both tables travel in one copy, from pinned memory to a GPU: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpcore_kernels._dtypes import access_bytes, pointer

# 16 elements a thread with 8 warps of 32: several wide accesses in flight, at most 40 registers on
# sm_90, no spills
CHUNK = 4096
WARPS = 8
# what masked bodies take at a time. Not CHUNK: Triton chooses one layout for blocks of one shape
# that start from the same addresses. Masked loads would get that of the wide loads, and masked
# stores one of their own, with an exchange through shared memory in between
ROUND = 1024

_COLUMNS = 5
_COLUMNS_IN_KERNEL = tl.constexpr(_COLUMNS)


@dataclass(frozen=True)
class Table:
    """What one launch works on.

    Attributes:
        source: Dtype of the tensors that are read.
        destination: Dtype of the tensors that are written.
        entries: `[tensors, 5]`, int64, on the device: see the module's docstring.
        owners: `[programs]`, int64, on the device: the entry of each chunk.
    """

    source: torch.dtype
    destination: torch.dtype
    entries: Tensor
    owners: Tensor

    @property
    def programs(self) -> int:
        """The number of chunks, which is the size of the grid."""
        return self.owners.numel()


def build(sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> list[Table]:
    """Groups pairs of tensors by their dtypes and describes each group, without a host sync.

    The tensors must have been checked (`_checks`): pairs of one shape and layout, dense, on one
    device. The tables hold bare addresses, so they are valid only while the tensors live, and a
    launch must follow on the stream that is current now.

    Args:
        sources: Tensors to read, any shapes.
        destinations: Tensors to write, one per source; the same list to work in place.

    Returns:
        One table per combination of dtypes that has at least one element.

    Example:
        >>> tensors = [torch.zeros(3), torch.zeros(0), torch.zeros(5000)]
        >>> (table,) = build(tensors, tensors)
        >>> table.entries[:, 2:].tolist(), table.owners.tolist()
        ([[3, 0, 0], [5000, 1, 2]], [0, 1, 1])
    """
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[int, int, int, int, int]]] = {}
    programs: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for index, (source, destination) in enumerate(zip(sources, destinations, strict=True)):
        size = source.numel()
        if size == 0:
            continue
        key = (source.dtype, destination.dtype)
        first = programs.get(key, 0)
        entry = (source.data_ptr(), destination.data_ptr(), size, first, index)
        groups.setdefault(key, []).append(entry)
        programs[key] = first + -(-size // CHUNK)
    device = sources[0].device if sources else torch.device("cpu")
    tables = []
    for key, rows in groups.items():
        entries, owners = _upload(rows, programs[key], device)
        tables.append(Table(*key, entries=entries, owners=owners))
    return tables


def _upload(
    rows: list[tuple[int, int, int, int, int]], programs: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Puts both tables of one group on `device`, in one copy that the host does not wait for."""
    entries = torch.tensor(rows, dtype=torch.int64, device="cpu")
    firsts = entries[:, 3]
    ends = torch.cat([firsts[1:], firsts.new_tensor([programs])])
    owners = torch.repeat_interleave(ends - firsts, output_size=programs)
    host = torch.empty(
        entries.numel() + programs,
        dtype=torch.int64,
        device="cpu",
        pin_memory=device.type == "cuda",
    )
    torch.cat([entries.flatten(), owners], out=host)
    both = host.to(device, non_blocking=True)
    return both[: entries.numel()].view(-1, _COLUMNS), both[entries.numel() :]


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Returns a copy of host `values` on `device` that the host does not wait for."""
    pinned = values.pin_memory() if device.type == "cuda" else values
    return pinned.to(device, non_blocking=True)


def mark_written(*tensors: Tensor) -> None:
    """Tells autograd that `tensors` were written, which a write by address does not do itself."""
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


@triton.jit
def locate(entries_ptr, owners_ptr, CHUNK: tl.constexpr):
    """Returns this program's source and destination address, first element, size and index."""
    program = tl.program_id(0)
    entry = entries_ptr + tl.load(owners_ptr + program) * _COLUMNS_IN_KERNEL
    source = tl.load(entry)
    destination = tl.load(entry + 1)
    size = tl.load(entry + 2)
    start = (program - tl.load(entry + 3)) * CHUNK
    index = tl.load(entry + 4)
    return source, destination, start, size, index


@triton.jit
def is_aligned(address, FORMAT: tl.constexpr, OTHER: tl.constexpr):
    """Tells whether full chunks at `address` may use accesses of `access_bytes`."""
    return address % access_bytes(FORMAT, OTHER) == 0


@triton.jit
def aligned_pointer(address, start, FORMAT: tl.constexpr, OTHER: tl.constexpr):
    """Returns a pointer to element `start`, a multiple of CHUNK, that promises its alignment.

    `is_aligned` must hold for `address`. The promise is made for the sum, because Triton 3.7
    forgets one that is made for an address turned into a pointer.
    """
    return tl.multiple_of(pointer(address, FORMAT) + start, access_bytes(FORMAT, OTHER))
