"""Compiles kernels and prints what their intermediate code promises and masks, as JSON.

All of them but those whose names contain one of the words that it is called with.

Run by test_compile.py in a process of its own, in which the kernels are not interpreted.
"""

import json
import re
import sys

import torch
import triton

import mpcore_kernels
from mpcore_kernels._variants import variants
from mpcore_kernels.audit import TARGETS, is_chosen


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
    chunked = [v for v in variants() if v.chunk and is_chosen(v, "", sys.argv[1:])]
    json.dump({"compiled": [*map(facts, chunked)], "refusal": refusal()}, sys.stdout)
