"""The rules that the machine code of a kernel must keep.

They are one pure function of a variant and its facts, so that each can be shown to fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton

from mpcore_audit.facts import Facts
from mpcore_kernels._launch import Variant

# what the widest access moves
WIDEST = 16
# how often threads wait in one reduction, by the release of Triton from which on that holds
_BARRIERS_PER_REDUCTION = (((3, 8), 1), ((0, 0), 2))


def findings(variant: Variant, facts: Facts) -> list[str]:
    """Returns which rules the machine code breaks, in words; none if it is as it should be."""
    found = []
    if facts.spills or facts.stack:
        found.append(f"spills: {facts.spills}, and {facts.stack} bytes of local memory")
    if facts.fused and not variant.enable_fp_fusion:
        found.append(f"{facts.fused} fused multiply-adds, declared uncontracted")
    if facts.adds_zero:
        # also where contraction is declared: that is about roundings, not about signs
        found.append(f"{facts.adds_zero} products added to +0, which makes +0 of -0")
    if facts.approximations:
        found.append(f"approximate arithmetic: {', '.join(facts.approximations)}")
    if facts.flushes:
        found.append("flushes subnormal numbers, or does not round to nearest even")
    if facts.float_atomics:
        found.append(f"atomics on floating-point numbers: {', '.join(facts.float_atomics)}")
    if facts.specialized:
        found.append(f"a launch compiles in the value of {', '.join(facts.specialized)}")
    if variant.chunk:
        found += _findings_on_full_chunks(variant, facts)
    return found + _findings_on_waiting(variant, facts)


def allowed_barriers(reductions: int, release: str = triton.__version__) -> int:
    """Returns how often the threads of a program may wait for each other.

    Triton reduces inside a warp by exchanging registers, which takes no barrier. Across warps, one
    thread of each stores its result to shared memory, all wait, and every thread loads the results
    of all warps. Before 3.8 the loads were made by some threads, which stored what came out, all
    waited again, and every thread loaded that.

    One reduction after another uses the same shared memory, so that all wait once more between
    the last load of one and the first store of the next.

    Example:
        >>> [allowed_barriers(reductions, "3.9.0") for reductions in (0, 1, 2)]
        [0, 1, 3]
    """
    number = tuple(map(int, release.split(".")[:2]))
    each = next(each for since, each in _BARRIERS_PER_REDUCTION if number >= since)
    return reductions * each + max(0, reductions - 1)


def needed_widths(dtypes: Sequence[torch.dtype], among: Sequence[torch.dtype]) -> dict[int, int]:
    """Returns for tensors of `dtypes` how many elements accesses of each least width must cover.

    An access is as wide as it gets for the widest of `among`, all dtypes of the kernel. The others
    move as many elements with one access, and thus fewer bytes.

    Example:
        >>> needed_widths([torch.float16], [torch.float16, torch.float32])
        {8: 4}
    """
    widest = max((dtype.itemsize for dtype in among), default=1)
    return {WIDEST * dtype.itemsize // widest: WIDEST // widest for dtype in dtypes}


def _findings_on_full_chunks(variant: Variant, facts: Facts) -> list[str]:
    """Returns which rules the path of a full chunk breaks."""
    body, elements = facts.bodies[0], variant.chunk // facts.threads
    found = []
    if body.loops:
        found.append("a loop on the full-chunk path, whose accesses cannot be counted")
    moved, needed = body.bytes / elements, variant.bytes_needed
    if moved > needed:
        found.append(f"moves {moved:g} bytes per element, needs {needed}")
    elif moved < needed:
        # the kernel cannot do with less, so it must be the audit that overlooks an access
        found.append(f"moves {moved:g} bytes per element as far as can be seen, needs {needed}")
    both = variant.reads + variant.writes
    found += _too_narrow("loads", body.loads, variant.reads, both, elements)
    found += _too_narrow("stores", body.stores, variant.writes, both, elements)
    return found + _findings_on_results(variant, facts)


def _findings_on_results(variant: Variant, facts: Facts) -> list[str]:
    """Returns where a program writes more about its chunk than it has to say."""
    body, found = facts.bodies[0], []
    written, needed = body.bytes_per_chunk, variant.bytes_needed_per_chunk
    if written > needed:
        found.append(f"writes {written} bytes per chunk, needs {needed}")
    elif written < needed:
        found.append(f"writes {written} bytes per chunk as far as can be seen, needs {needed}")
    # a thread adds to one counter of a group, or to the neighbours that fill the widest access, or
    # to more where there are more counters than threads
    shares = [max(WIDEST // 8, -(-size // facts.threads)) for size in variant.counters]
    additions = variant.additions + sum(map(min, variant.counters, shares))
    if body.atomics > additions:
        found.append(f"{body.atomics} atomics per thread, expected {additions}")
    return found


def _findings_on_waiting(variant: Variant, facts: Facts) -> list[str]:
    """Returns where threads wait for each other, or share memory, more than reductions need."""
    allowed, found = allowed_barriers(variant.reductions), []
    names = ("the full-chunk path", "the path of other chunks")
    waits = [(body.barriers, name) for body, name in zip(facts.bodies, names, strict=False)]
    if not variant.reductions or not facts.bodies:
        waits.append((facts.barriers, "all paths together"))
    for barriers, name in waits:
        if barriers > allowed:
            found.append(f"{barriers} barriers on {name}, expected {allowed}")
    if any(body.waits_in_a_loop for body in facts.bodies):
        found.append("a barrier in a loop, whose rounds cannot be counted")
    accesses = sum(body.shared for body in facts.bodies)
    if (facts.shared or accesses) and not variant.reductions:
        found.append(
            f"{facts.shared} bytes of shared memory, {accesses} accesses in an elementwise kernel"
        )
    return found


def _too_narrow(
    name: str,
    accesses: Mapping[int, int],
    dtypes: Sequence[torch.dtype],
    among: Sequence[torch.dtype],
    elements: int,
) -> list[str]:
    """Returns a finding if a tensor is read or written in narrower pieces than it could be."""
    if not accesses or not dtypes:
        return []
    widths = needed_widths(dtypes, among)
    if min(accesses) < min(widths):
        return [
            f"{name} of {8 * min(accesses)} bits on the full-chunk path, expected at least "
            f"{8 * min(widths)}"
        ]
    per_access = WIDEST // max(dtype.itemsize for dtype in among)
    expected = len(dtypes) * -(-elements // per_access)
    # as many bytes in more pieces: a wider tensor among narrower ones is read too narrowly
    if sum(accesses.values()) > expected:
        return [
            f"{sum(accesses.values())} {name} per thread on the full-chunk path, expected "
            f"{expected}"
        ]
    return []
