"""What the audit knows about one compiled kernel, and how it finds out.

NVIDIA's code is read from `nvdisasm` and `cuobjdump`, which come with Triton. On AMD the
compiler's own assembly is read. Two things are not checked there: which accesses a mask switches
off (masks are no predicates on AMD, but offsets out of range), and whether the assembler keeps to
the assembly.

Division, square root and, on AMD, conversions between int64 and floats are routines made of fused
multiply-adds. Where a kernel has one of them, its fused multiply-adds are looked for one step
earlier, in PTX or in LLVM's language, where the routine is still a single operation. That is no
less strict: the assembler for PTX may fuse only what is not marked `.rn` there, and LLVM only what
is marked `contract`. Assemblers before CUDA 13.1 do fuse packed pairs that are marked `.rn`; no
routine has packed ones, so that those are looked for in the machine code always.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from mpcore_audit import amdgcn, sass
from mpcore_audit.blocks import Block
from mpcore_audit.machine_code import Body, bodies
from mpcore_kernels._launch import Variant

# arithmetic that PTX lets its assembler contract, or that is contracted already
_PTX_FUSED = re.compile(r"\s(?:(?:fma|mad)\.[\w.]*f(?:16|32|64)|(?:mul|add|sub)\.f(?:32|64)\s)")
_PTX_ADDS_ZERO = re.compile(r"\sfma\.[\w.]*f(?:16|32|64)\s[^;]*, 0[fd]0+;")
_PTX_ROUTINES = re.compile(r"\s(?:div|sqrt|rcp)\.r[nzmp]\.[\w.]*f(?:32|64)")
_PTX_APPROXIMATE = re.compile(r"\s((?:\w+\.approx|div\.full)[\w.]*)")
# the same for LLVM's language; conversions between int64 and floats are made of arithmetic on AMD
_LLVM_FUSED = re.compile(r"\b(?:contract|fast|llvm\.fma|llvm\.fmuladd)\b")
_LLVM_ROUTINES = re.compile(
    r"\bfdiv\b|llvm\.sqrt|\bfpto[su]i\b.* to (?:<\d+ x )?i64|\b[su]itofp (?:<\d+ x )?i64"
)
_LLVM_APPROXIMATE = re.compile(
    r"(llvm\.amdgcn\.(?:rcp|rsq|sqrt|exp2|log)[\w.]*|\barcp\b|\bafn\b|!fpmath)"
)


@dataclass(frozen=True)
class Facts:
    """What the machine code of one variant for one GPU does.

    Attributes:
        target: The GPU, as its maker calls it: `"sm_90"`, `"gfx942"`.
        threads: Threads per program.
        registers: Registers per thread (vector registers on AMD).
        stack: Bytes of local memory per thread.
        spills: Registers that are moved to memory and back, or accesses that do so.
        shared: Bytes of shared memory per program.
        barriers: Waits for other threads in all of the code.
        fused: Fused multiply-adds outside the routines of division, square root and conversion.
        adds_zero: Products that are added to +0 and to nothing else. On NVIDIA, whose routines do
            so, outside of them; on AMD anywhere.
        approximations: Operations that are not rounded correctly, such as `div.full.f32`: in PTX,
            and in LLVM's language as well as in the machine code for AMD.
        flushes: Whether subnormal numbers are flushed, or results not rounded to nearest even.
        float_atomics: Atomic operations on floating-point numbers.
        specialized: Arguments whose values a launch would compile into the code.
        bodies: What a full chunk executes; then what any other chunk does.
    """

    target: str
    threads: int
    registers: int
    stack: int
    spills: int
    shared: int
    barriers: int
    fused: int
    adds_zero: int
    approximations: tuple[str, ...]
    flushes: bool
    float_atomics: tuple[str, ...]
    specialized: tuple[str, ...]
    bodies: tuple[Body, ...]


def examine(variant: Variant, target: GPUTarget) -> Facts:
    """Compiles `variant` for `target` and reads the machine code.

    Raises:
        RuntimeError: If Triton comes without the programs that read NVIDIA's machine code.
    """
    compiled = triton.compile(variant.source(), target=target, options=variant.options())
    return (_read_nvidia if target.backend == "cuda" else _read_amd)(variant, target, compiled)


def _read_nvidia(variant: Variant, target: GPUTarget, compiled: Any) -> Facts:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        code = _tool("nvdisasm", str(cubin))
    resources = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    blocks, ptx = sass.parse(code), compiled.asm["ptx"]
    instructions = [i for block in blocks for i in block.instructions]
    adds_zero = sass.adds_zero(code)
    flushes = any("FTZ" in i.opcode.split(".") for i in instructions)
    if _PTX_ROUTINES.search(ptx):
        # the routines fuse and flush where they may; everything else has its origin in the PTX
        adds_zero = len(_PTX_ADDS_ZERO.findall(ptx))
        flushes = ".ftz" in ptx
    return Facts(
        target=f"sm_{target.arch}",
        registers=resources["REG"],
        stack=resources["STACK"] + resources["LOCAL"],
        spills=sum(i.memory == "local" for i in instructions),
        fused=fused_on_nvidia(code, ptx),
        adds_zero=adds_zero,
        approximations=tuple(sorted(set(_PTX_APPROXIMATE.findall(ptx)))),
        flushes=flushes,
        float_atomics=_float_atomics(blocks, r"\.F\d\d|\.BF16"),
        **_common(variant, target, compiled, blocks, frozenset()),
    )


def fused_on_nvidia(disassembly: str, ptx: str) -> int:
    """Returns how many fused multiply-adds a kernel has outside the routines of division and root.

    Packed ones count wherever they come from: no routine has any.
    """
    if _PTX_ROUTINES.search(ptx):
        return max(len(_PTX_FUSED.findall(ptx)), sass.fused_pairs(disassembly))
    return sass.fused(disassembly)


def _read_amd(variant: Variant, target: GPUTarget, compiled: Any) -> Facts:
    code, middle = compiled.asm["amdgcn"], compiled.asm["llir"]
    numbers = {name: int(value) for name, value in re.findall(r"\.(\w+): +(\d+)\n", code)}
    modes = dict(re.findall(r"\.amdhsa_float_(\w+) (\d)", code))
    blocks = amdgcn.parse(code)
    fused = amdgcn.fused(code)
    if _LLVM_ROUTINES.search(middle):
        fused = len(_LLVM_FUSED.findall(middle))
    # 3: subnormals are neither flushed when read nor when written; 0: to nearest even
    exact = {"denorm_mode_32": "3", "denorm_mode_16_64": "3"}
    exact |= {"round_mode_32": "0", "round_mode_16_64": "0"}
    return Facts(
        target=str(target.arch),
        registers=numbers["vgpr_count"] + numbers["agpr_count"],
        stack=numbers["private_segment_fixed_size"],
        spills=numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"],
        fused=fused,
        adds_zero=amdgcn.adds_zero(code),
        approximations=amdgcn.approximations(code)
        + tuple(sorted(set(_LLVM_APPROXIMATE.findall(middle)))),
        flushes=any(modes[name] != value for name, value in exact.items()),
        float_atomics=_float_atomics(blocks, r"_f\d\d|_bf16"),
        **_common(variant, target, compiled, blocks, amdgcn.ENTRY),
    )


def _common(
    variant: Variant, target: GPUTarget, compiled: Any, blocks: list[Block], entry: frozenset[str]
) -> dict[str, Any]:
    """Returns the facts that are found in the same way on both makers' GPUs."""
    threads = variant.num_warps * target.warp_size
    needed = variant.bytes_needed * variant.chunk // threads
    return {
        "threads": threads,
        "shared": compiled.metadata.shared,
        "barriers": sum(i.barrier for block in blocks for i in block.instructions),
        "specialized": tuple(variant.specialized()),
        "bodies": tuple(bodies(blocks, entry, needed)) if variant.chunk else (),
    }


def _float_atomics(blocks: list[Block], pattern: str) -> tuple[str, ...]:
    opcodes = {i.opcode for block in blocks for i in block.instructions if i.access == "atomic"}
    return tuple(sorted(opcode for opcode in opcodes if re.search(pattern, opcode)))


def _tool(name: str, *arguments: str) -> str:
    """Returns the output of a program that comes with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise RuntimeError(
            f"audit: expected {name} in {path.parent}, found none. Install a Triton with NVIDIA's "
            "tools."
        )
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
