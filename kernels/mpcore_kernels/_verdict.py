"""The rules that the machine code of a kernel must keep.

They are one pure function of a variant and its facts, so that each can be shown to fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mpcore_kernels._facts import Facts
from mpcore_kernels._launch import Variant

# what the widest access moves
WIDEST = 16


def findings(variant: Variant, facts: Facts) -> list[str]:
    """Returns which rules the machine code breaks, in words; none if it is as it should be."""
    found = []
    if facts.spills or facts.stack:
        found.append(f"spills: {facts.spills}, and {facts.stack} bytes of local memory")
    if facts.fused and not variant.enable_fp_fusion:
        found.append(f"{facts.fused} fused multiply-adds, declared uncontracted")
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
    return found


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
    # one publishes the results of the warps; older compilers also wait before they reuse the place
    allowed = 2 * variant.reductions
    if body.barriers > allowed:
        found.append(f"{body.barriers} barriers on the full-chunk path, expected {allowed}")
    if body.shared and not variant.reductions:
        found.append(f"{body.shared} accesses to shared memory in an elementwise kernel")
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
