"""Compiles every kernel for real GPUs, without one, and prints what the machine code does as JSON.

Run by test_compile.py in a process of its own, in which the kernels are not interpreted.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import mpcore_kernels
from mpcore_kernels._dtypes import FORMATS
from mpcore_kernels._table import CHUNK, WARPS
from mpcore_kernels.cast import _cast_kernel
from mpcore_kernels.unscale import _unscale_kernel

TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
UNSCALE_PAIRS = [(HALF, HALF), (BRAIN, BRAIN), (FULL, FULL), (HALF, FULL), (BRAIN, FULL)]
# kernel, types of its pointers, names of its two formats, the pairs that launchers use
KERNELS = [
    (_unscale_kernel, ["*i64", "*i64", "*fp32", "*i32"], ("GRAD", "OUT"), UNSCALE_PAIRS),
    (_cast_kernel, ["*i64", "*i64", "*i32", "*i64"], ("MASTER", "WEIGHT"), [(FULL, HALF)]),
    (_cast_kernel, ["*i64", "*i64", "*i32", "*i64"], ("MASTER", "WEIGHT"), [(FULL, BRAIN)]),
]


def tool(name, *arguments):
    """The output of a program that the triton wheel ships."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def nvidia_facts(compiled):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", cubin)
        code = tool("nvdisasm", cubin)
    resources = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    return {
        "registers": resources["REG"],
        "spilled": resources["STACK"] + resources["LOCAL"],
        "instructions": Counter(
            re.findall(r"^\s+/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", code, re.M)
        ),
    }


def amd_facts(compiled):
    code = compiled.asm["amdgcn"]
    settings = re.findall(r"\.amdhsa_float_(\w+) (\d)", code)
    spills = [r"\.sgpr_spill_count: +(\d+)", r"\.vgpr_spill_count: +(\d+)", r"; ScratchSize: (\d+)"]
    return {
        "modes": {name: int(value) for name, value in settings},
        "spilled": sum(int(re.search(pattern, code).group(1)) for pattern in spills),
        "instructions": Counter(re.findall(r"^\t([a-z]\w+)", code, re.M)),
    }


def facts(kernel, pointers, names, dtypes, target):
    constants = {name: FORMATS[dtype] for name, dtype in zip(names, dtypes, strict=True)}
    constants["CHUNK"] = CHUNK
    signature = dict(zip(kernel.arg_names, pointers, strict=False))
    compiled = triton.compile(
        ASTSource(
            fn=kernel,
            signature=signature | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
        ),
        target=GPUTarget(*target),
        options={"num_warps": WARPS, "enable_fp_fusion": False},
    )
    read = nvidia_facts if target[0] == "cuda" else amd_facts
    middle = compiled.asm["ttir"]
    return {
        "kernel": kernel.__name__,
        "formats": [str(dtype).removeprefix("torch.") for dtype in dtypes],
        "target": str(target[1]),
        # promised alignments; masked loads; those whose other lanes are undefined
        "promises": [int(n) for n in re.findall(r"tt\.divisibility = dense<(\d+)>", middle)],
        "masked_loads": len(re.findall(r"tt\.load %\w+, %\w+", middle)),
        "undefined_loads": len(re.findall(r"tt\.load %\w+, %\w+ :", middle)),
        **read(compiled),
    }


def refusal():
    """What a launcher says to CPU tensors when its kernel is compiled."""
    try:
        mpcore_kernels.unscale_([], torch.tensor(1.0), torch.zeros(0, dtype=torch.int32))
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    found = [
        facts(kernel, pointers, names, dtypes, target)
        for kernel, pointers, names, pairs in KERNELS
        for dtypes in pairs
        for target in TARGETS
    ]
    json.dump({"compiled": found, "refusal": refusal()}, sys.stdout)
