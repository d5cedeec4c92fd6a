"""Counting elements of a kind without any thread waiting for another."""

from __future__ import annotations

import triton
import triton.language as tl

#: One number counts both kinds of a chunk, which has fewer elements: 1 if adopted, this if refused.
REFUSED = tl.constexpr(2**16)


@triton.jit
def by_thread(counts, ALIGNED: tl.constexpr):
    """Adds up what a thread has counted, without waiting for another."""
    if ALIGNED:
        # the four neighbours of a wide access belong to one thread
        return tl.sum(tl.reshape(counts, (counts.shape[0] // 4, 4)), axis=1)
    else:
        return counts


@triton.jit
def add_to(counter_ptr, counts):
    """Adds numbers to one counter, where they are not 0."""
    # relaxed: nothing else is published along with the count
    tl.atomic_add(
        counter_ptr + tl.zeros_like(counts), counts.to(tl.int64), mask=counts != 0, sem="relaxed"
    )


@triton.jit
def count_edits(edits_ptr, counts):
    """Adds what `adopted_by` tells to the two counters of a tensor."""
    add_to(edits_ptr, counts & (REFUSED - 1))
    add_to(edits_ptr + 1, counts >> 16)
