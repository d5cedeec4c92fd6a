"""Cutting tensors for a CPU's cache: large ones into chunks, small ones together into blocks.

Everything is done block by block, all passes over one block before the next, so that only the
first pass waits for memory. A block of one chunk is large enough for torch to use all cores, and
its float32 scratch is all the extra memory there is.

Chunks start at multiples of 64 elements from the start of their tensor: torch's vectorized kernels
round the last few elements of a range differently, and so the cut cannot be seen in the bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcore.base import GradientSet

#: Elements of a block: 2 MiB of float32, which fits the second-level caches of two cores.
CHUNK = 2**19


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of tensor `index`, in the order of memory."""

    index: int
    start: int
    stop: int


def blocks(sizes: Sequence[int], chunk: int = CHUNK) -> Iterator[list[Piece]]:
    """Yields pieces of all tensors in order, at most `chunk` elements at a time.

    Args:
        sizes: Elements of each tensor.
        chunk: A multiple of 64.

    Example:
        >>> [[(p.index, p.start, p.stop) for p in b] for b in blocks([3, 2, 130, 1], chunk=64)]
        [[(0, 0, 3), (1, 0, 2)], [(2, 0, 64)], [(2, 64, 128)], [(2, 128, 130), (3, 0, 1)]]
    """
    block: list[Piece] = []
    room = chunk
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            # a tensor is cut at multiples of the chunk, so one that does not fit starts a block
            stop = min(start + chunk, size)
            if stop - start > room:
                yield block
                block, room = [], chunk
            block.append(Piece(index, start, stop))
            room -= stop - start
            start = stop
    if block:
        yield block


def innermost_first(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Returns the dimensions of a dense tensor, that of neighbours in memory first.

    Example:
        >>> innermost_first((2, 3), (3, 1))
        [1, 0]
    """
    return sorted(range(len(shape)), key=lambda d: (strides[d], shape[d]))


def memory_order(tensor: Tensor) -> Tensor:
    """Returns the elements as they lie in memory: a view if the tensor is dense, else a copy.

    An expanded one has fewer elements in memory than it says.

    To be called without gradients, like all here.

    Example:
        >>> memory_order(torch.tensor([[1, 2], [3, 4]]).t()).tolist()
        [1, 2, 3, 4]
    """
    if tensor.is_contiguous():
        return tensor if tensor.dim() == 1 else tensor.view(-1)
    order = innermost_first(tensor.shape, tensor.stride())
    return tensor.permute(order[::-1]).reshape(-1).contiguous()


def all_in_memory_order(tensors: Sequence[Tensor]) -> GradientSet:
    """Returns the same of many, where only those that need it are made into other tensors.

    Args:
        tensors: Contiguous ones come back as they are, of any shape.
    """
    known = GradientSet.of(tensors)
    return known if known.are_contiguous else GradientSet(map(memory_order, known))


def cut(flat: Sequence[Tensor], block: Sequence[Piece]) -> list[Tensor]:
    """Returns the pieces of a block as views."""
    return [
        flat[piece.index]
        if piece.start == 0 and piece.stop == flat[piece.index].numel()
        else flat[piece.index][piece.start : piece.stop]
        for piece in block
    ]


def layout(block: Sequence[Piece], scratch: Tensor) -> list[Tensor]:
    """Returns room for each piece of a block in `scratch`, one after the other."""
    sizes = [piece.stop - piece.start for piece in block]
    if len(sizes) == 1:
        return [scratch[: sizes[0]]]
    return list(torch.split(scratch[: sum(sizes)], sizes))


def new_scratch(sizes: Sequence[int]) -> Tensor:
    """Returns float32 room for the largest block of tensors of these sizes."""
    return torch.empty(min(sum(sizes), CHUNK), dtype=torch.float32, device="cpu")


def copy_all(destinations: list[Tensor], sources: list[Tensor]) -> None:
    """Copies and converts pieces: one call for many."""
    if len(sources) == 1:
        destinations[0].copy_(sources[0])
    else:
        torch._foreach_copy_(destinations, sources)


def none_reaches(pieces: list[Tensor], scratch: Tensor, limit: float) -> bool:
    """Whether every magnitude is surely below `limit`; False decides nothing.

    The length of a vector bounds each of its elements, and costs one dot product in the cache
    where a search for the largest costs two comparisons an element. The margin of one percent is
    far beyond the rounding of the product.

    Args:
        pieces: float32.
        scratch: Overwritten, if there are several pieces.
        limit: Above 0.
    """
    if len(pieces) == 1:
        vector = pieces[0]
    else:
        vector = scratch[: sum(piece.numel() for piece in pieces)]
        torch.cat(pieces, out=vector)
    return float(torch.dot(vector, vector)) < 0.99 * limit * limit
