"""Compiles kernels that break a rule each and prints what the audit finds, as JSON.

Run by test_audit.py in a process of its own, in which the kernels are not interpreted.
"""

import dataclasses
import json
import sys

import torch
import triton
import triton.language as tl

from mpcore_audit.facts import examine
from mpcore_audit.rows import TARGETS
from mpcore_audit.verdict import findings
from mpcore_kernels import _dtypes
from mpcore_kernels._dtypes import narrow_product, widen
from mpcore_kernels._launch import Variant
from mpcore_kernels._table import CHUNK, WARPS

NAMES = ["x_ptr", "y_ptr"]


@triton.jit
def at_chunk(pointer, CHUNK: tl.constexpr):
    """Pointers to this program's elements, with the promise that they start at 16 bytes."""
    return tl.multiple_of(pointer + tl.program_id(0) * CHUNK, 16) + tl.arange(0, CHUNK)


@triton.jit(do_not_specialize_on_alignment=NAMES)
def good(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Doubles, in the widest pieces."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    tl.store(y_ptr, tl.load(x_ptr) * 2)


@triton.jit(do_not_specialize_on_alignment=NAMES)
def narrow(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Promises no alignment."""
    offsets = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets) * 2)


@triton.jit(do_not_specialize_on_alignment=[*NAMES, "n_ptr"])
def masked(x_ptr, y_ptr, n_ptr, CHUNK: tl.constexpr):
    """Has a mask everywhere."""
    mask = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK) < tl.load(n_ptr)
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    tl.store(y_ptr, tl.load(x_ptr, mask=mask) * 2, mask=mask)


@triton.jit(do_not_specialize_on_alignment=NAMES)
def contracted(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Asks for a fused multiply-add."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    x = tl.load(x_ptr)
    tl.store(y_ptr, tl.fma(x, x, x))


@triton.jit(do_not_specialize_on_alignment=NAMES)
def adds_zero(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Multiplies by a fused multiply-add, which makes +0 of -0."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    tl.store(y_ptr, tl.fma(tl.load(x_ptr), 2.5, 0.0))


@triton.jit(do_not_specialize_on_alignment=[*NAMES, "factor_ptr"])
def rounded_product(x_ptr, y_ptr, factor_ptr, CHUNK: tl.constexpr):
    """Rounds a product to FP16, sign and all; without promises, which would make vectors of it."""
    offsets = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    product = widen(tl.load(x_ptr + offsets), tl.float16) * tl.load(factor_ptr)
    tl.store(y_ptr + offsets, _dtypes.narrow(product, tl.float16))


@triton.jit(do_not_specialize_on_alignment=[*NAMES, "factor_ptr"])
def rounded_magnitude(x_ptr, y_ptr, factor_ptr, CHUNK: tl.constexpr):
    """Does what `rounded_product` does, but for the sign."""
    offsets = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    product = widen(tl.load(x_ptr + offsets), tl.float16) * tl.load(factor_ptr)
    tl.store(y_ptr + offsets, narrow_product(product, tl.float16))


@triton.jit(do_not_specialize_on_alignment=NAMES)
def adds_zero_beside_a_division(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Does so where a division brings other fused multiply-adds along."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    x = tl.load(x_ptr)
    tl.store(y_ptr, tl.div_rn(x + 1, tl.fma(x, 2.5, 0.0)))


@triton.jit(do_not_specialize_on_alignment=NAMES)
def adds_zero_on_amd(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Does what LLVM may do to a product that is rounded to FP16, beside a division."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    x = tl.load(x_ptr)
    product = tl.inline_asm_elementwise(
        "v_fma_mixlo_f16 $0, $1, $1, 0", "=v,v", [x], dtype=tl.int32, is_pure=True, pack=1
    )
    tl.store(y_ptr, tl.div_rn(x, product.to(tl.float32, bitcast=True)))


@triton.jit(do_not_specialize_on_alignment=NAMES)
def contracted_beside_a_division(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Asks for a fused multiply-add where a division brings others along."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    x = tl.load(x_ptr)
    tl.store(y_ptr, tl.fma(x, x, tl.div_rn(x + 1, x)))


@triton.jit(do_not_specialize_on_alignment=NAMES)
def exact_division(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Divides and takes a square root by IEEE's rules, and adds."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    x = tl.load(x_ptr)
    tl.store(y_ptr, tl.div_rn(x + 1, x) * x + tl.sqrt_rn(x))


@triton.jit(do_not_specialize_on_alignment=NAMES)
def approximate(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Divides as Triton's `/` does."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    x = tl.load(x_ptr)
    tl.store(y_ptr, (x + 1) / x)


@triton.jit(do_not_specialize_on_alignment=NAMES)
def root(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Takes Triton's fast square root, beside an exact one."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    x = tl.load(x_ptr)
    tl.store(y_ptr, tl.sqrt(x) + tl.sqrt_rn(x + 1))


@triton.jit(do_not_specialize_on_alignment=NAMES)
def exponential(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Takes a power, which no GPU rounds correctly."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    tl.store(y_ptr, tl.exp(tl.load(x_ptr)))


@triton.jit(do_not_specialize_on_alignment=NAMES)
def reciprocal_on_amd(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Hides a fast reciprocal from LLVM, beside an exact division."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    x = tl.load(x_ptr)
    fast = tl.inline_asm_elementwise(
        "v_rcp_f32 $0, $1", "=v,v", [x], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(y_ptr, tl.div_rn(fast, x))


@triton.jit(do_not_specialize_on_alignment=[*NAMES, "n_ptr"])
def exchanging_tail(x_ptr, y_ptr, n_ptr, CHUNK: tl.constexpr):
    """Is elementwise, but loads and stores of its last chunk have two layouts."""
    start = tl.program_id(0) * CHUNK
    n = tl.load(n_ptr)
    if start + CHUNK <= n:
        tl.store(at_chunk(y_ptr, CHUNK), tl.load(at_chunk(x_ptr, CHUNK)) * 2)
    else:
        x_ptr += start
        y_ptr += start
        offsets = tl.arange(0, CHUNK)
        mask = offsets < n - start
        x = tl.load(x_ptr + offsets, mask=mask, other=0)
        tl.store(y_ptr + offsets, x * 2, mask=mask)


@triton.jit(do_not_specialize_on_alignment=[*NAMES, "n_ptr"])
def waiting_tail(x_ptr, y_ptr, n_ptr, CHUNK: tl.constexpr):
    """Reduces its last chunk in rounds, and waits in each."""
    start = tl.program_id(0) * CHUNK
    n = tl.load(n_ptr)
    if start + CHUNK <= n:
        largest = tl.max(tl.load(at_chunk(x_ptr, CHUNK)), axis=0)
    else:
        largest = tl.full((), 0.0, tl.float32)
        for at in range(start, n, 1024):
            offsets = tl.arange(0, 1024)
            x = tl.load(x_ptr + at + offsets, mask=offsets < n - at, other=0)
            largest = tl.maximum(largest, tl.max(x, axis=0))
    tl.store(y_ptr + tl.program_id(0), largest)


@triton.jit(do_not_specialize_on_alignment=NAMES)
def reports_twice(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Writes two numbers about a chunk where one was declared."""
    largest = tl.max(tl.load(at_chunk(x_ptr, CHUNK)), axis=0)
    tl.store(y_ptr + tl.program_id(0) * 3, largest)
    tl.store(y_ptr + tl.program_id(0) * 3 + 2, -largest)


@triton.jit(do_not_specialize_on_alignment=NAMES)
def counts_twice(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Adds to two counters where one was declared."""
    x = tl.load(at_chunk(x_ptr, CHUNK))
    negative = tl.sum((x < 0).to(tl.int32), axis=0)
    tl.atomic_add(y_ptr, negative, sem="relaxed")
    tl.atomic_add(y_ptr + 1, CHUNK - negative, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=NAMES)
def twice(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Reads what it has read."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    x = tl.load(x_ptr)
    tl.store(y_ptr, x * 2)
    tl.store(y_ptr, x * 2 + tl.load(x_ptr, volatile=True))


@triton.jit(do_not_specialize_on_alignment=NAMES)
def barrier(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Exchanges elements between threads."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    x = tl.load(x_ptr)
    tl.store(y_ptr, x * 2 + tl.sum(x.to(tl.int32), axis=0))


@triton.jit(do_not_specialize_on_alignment=NAMES)
def spills(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Keeps a matrix in the registers of one warp."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    x = tl.load(x_ptr)
    tl.debug_barrier()
    y = tl.load(y_ptr)
    tl.debug_barrier()
    tl.store(y_ptr, x * y + tl.sum(x, axis=0) + tl.sum(y, axis=0))


@triton.jit(do_not_specialize_on_alignment=NAMES)
def float_atomic(x_ptr, y_ptr, CHUNK: tl.constexpr):
    """Adds floats in whatever order."""
    x = tl.load(at_chunk(x_ptr, CHUNK))
    tl.atomic_add(y_ptr, tl.sum(x, axis=0))


@triton.jit
def specialized(x_ptr, y_ptr, n, CHUNK: tl.constexpr):
    """Lets a launch compile in its alignments and a size."""
    x_ptr = at_chunk(x_ptr, CHUNK)
    y_ptr = at_chunk(y_ptr, CHUNK)
    tl.store(y_ptr, tl.load(x_ptr) * n)


def variant(kernel, **changes):
    fields = {
        "arguments": ("*fp32", "*fp32"),
        "constants": (("CHUNK", CHUNK),),
        "num_warps": WARPS,
        "enable_fp_fusion": False,
        "reads": (torch.float32,),
        "writes": (torch.float32,),
        "chunk": CHUNK,
    }
    return Variant(kernel=kernel, **(fields | changes))


# more than 512 registers for each thread of one warp, also where products replace their factors
LONG = 32768
HALVES = {
    "arguments": ("*i16", "*i16", "*fp32"),
    "reads": (torch.float16,),
    "writes": (torch.float16,),
}
VARIANTS = [
    variant(good),
    variant(narrow),
    variant(masked, arguments=("*fp32", "*fp32", "*i32")),
    variant(contracted),
    variant(adds_zero),
    variant(rounded_product, **HALVES),
    variant(rounded_magnitude, **HALVES),
    variant(adds_zero_beside_a_division),
    variant(adds_zero_on_amd),
    variant(contracted_beside_a_division),
    variant(exact_division),
    variant(approximate),
    variant(root),
    variant(exponential),
    variant(reciprocal_on_amd),
    variant(exchanging_tail, arguments=("*fp32", "*fp32", "*i32")),
    variant(
        waiting_tail,
        arguments=("*fp32", "*fp32", "*i32"),
        writes=(),
        results=(torch.float32,),
        reductions=1,
    ),
    variant(reports_twice, writes=(), results=(torch.float32,), reductions=1),
    variant(counts_twice, arguments=("*fp32", "*i32"), writes=(), counters=(1,), reductions=1),
    variant(twice),
    variant(barrier),
    variant(spills, constants=(("CHUNK", LONG),), chunk=LONG, num_warps=1),
    variant(float_atomic, writes=()),
    variant(specialized, arguments=("*fp32", "*fp32", "i32")),
]

if __name__ == "__main__":
    found = {}
    for bad in VARIANTS:
        for target in TARGETS[1::2]:
            if bad.kernel in (reciprocal_on_amd, adds_zero_on_amd) and target.backend != "hip":
                continue
            facts = examine(bad, target)
            found[f"{bad.kernel.__name__} {facts.target}"] = {
                "findings": findings(bad, facts),
                "fused": facts.fused,
                "facts": str(dataclasses.asdict(facts)["bodies"]),
            }
    json.dump(found, sys.stdout)
