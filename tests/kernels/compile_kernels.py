"""Compiles kernels, prints their audit and what their intermediate code promises, as JSON.

All of them but those whose names contain one of the words that it is called with. The audit is of
all these variants for one GPU, and of one variant of each kernel for another maker's.

Run by test_compile.py in a process of its own, in which the kernels are not interpreted.
"""

import json
import re
import sys
from dataclasses import asdict

import torch
import triton

import mpcore_kernels
from mpcore_audit.facts import examine
from mpcore_audit.rows import TARGETS, plain, row, target_name
from mpcore_audit.variants import variants

FORMATS = re.compile(r" (fp16|bf16|fp32|WEIGHT=None)\b")


def audit(chosen):
    """The rows of `audit --json`: every variant on sm_90, the first of each kernel on gfx942."""
    targets = {target_name(target): target for target in TARGETS}
    rows, seen = [], set()
    for variant in chosen:
        kernel = FORMATS.sub("", variant.name)
        for name in ("sm_90", "gfx942") if kernel not in seen else ("sm_90",):
            found = examine(variant, targets[name])
            rows.append({**row(variant, found), "facts": plain(asdict(found))})
        seen.add(kernel)
    return rows


def facts(variant):
    """What Triton's own language says, which is the same for all GPUs."""
    compiled = triton.compile(variant.source(), target=TARGETS[1], options=variant.options())
    middle = compiled.asm["ttir"]
    # an update writes what it reads, but for the gradient; what is adopted goes to the master
    in_place = len(variant.reads) - 1 if variant.name.startswith(("update", "adopt")) else 0
    return {
        "name": variant.name,
        "reads": len(variant.reads),
        "sides": [str(dtype) for dtype in variant.reads + variant.writes[in_place:]],
        # promised alignments; masked loads; those whose other lanes are undefined
        "promises": [int(n) for n in re.findall(r"tt\.divisibility = dense<(\d+)>", middle)],
        "masked_loads": len(re.findall(r"tt\.load %[\w#]+, %\w+", middle)),
        "undefined_loads": len(re.findall(r"tt\.load %[\w#]+, %\w+ :", middle)),
    }


def refusal():
    """What a launcher says to CPU tensors when its kernel is compiled."""
    try:
        mpcore_kernels.unscale_([], torch.tensor(1.0), torch.zeros(0, dtype=torch.int32))
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    chosen = [
        variant for variant in variants() if not any(word in variant.name for word in sys.argv[1:])
    ]
    compiled = [facts(variant) for variant in chosen if variant.chunk]
    json.dump({"rows": audit(chosen), "compiled": compiled, "refusal": refusal()}, sys.stdout)
