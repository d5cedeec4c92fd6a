"""All cases of sharded models, run on each rank of one process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from mpcore_testing import sharded_accidents as accidents
from mpcore_testing import sharded_models
from mpcore_testing.rank_layouts import cast_later, driven, flat, muon, parted, trained

ONE_MESH = ("fsdp", "tensor", "sequence")
FOUR = ("fsdp", "hsdp", "2-D", "2-D sequence")
WAYS = ("clip", "unscale", "accumulate", "closure")


def cases_of(size: int) -> list[tuple[Any, ...]]:
    """Every layout steps and clips on both paths; the rest in pairs."""
    layouts = ONE_MESH if size == 2 else FOUR
    last, paths = size - 1, ("fused", "general")
    cases: list[tuple[Any, ...]] = []
    for layout in layouts:
        cases += [(trained, layout, "float16", p, "AdamW", "", last) for p in ("fused", "general")]
        cases += [
            (trained, layout, "bfloat16", "fused", "AdamW", "clip", rank) for rank in (0, last)
        ]
        cases += [(trained, layout, "float16", "mixed", "AdamW", way, last) for way in ("", "clip")]
        cases += [
            (trained, layout, "float32", p, "SGD", "clip", last) for p in ("fused", "general")
        ]
    if size == 2:
        cases += [(trained, "fsdp", "float16", "fused", "AdamW", way, 1) for way in WAYS]
        cases += [(trained, "fsdp", "bfloat16", "general", "SGD", way, 0) for way in WAYS]
        cases += [(trained, "tensor", "float16", "fused", "Lion", way, 1) for way in WAYS]
        cases += [(trained, "fsdp", "bfloat16", "mixed", "SGD", way, 0) for way in WAYS[1:]]
        cases += [
            (flat, clips, original, 1) for clips in (False, True) for original in (False, True)
        ]
        cases += sharded_models.cases_of(last)
        cases += [(muon,), (cast_later,)]
        cases += [(accidents.watched, bad) for bad in (False, True)]
        cases += [(accidents.relaid, path) for path in paths]
        cases += [(accidents.overflown_since, way) for way in ("clip", "unscale")]
        cases += [(accidents.single_number,), (accidents.apart,)]
        cases += [(accidents.master_edited, path) for path in paths]
        cases += [(accidents.first_edit, path) for path in paths]
        cases += [(accidents.computed, way) for way in ("", "clip")]
        cases += [(accidents.told, what) for what in ("group", "state", "gradient")]
    else:
        cases += [(driven, bad) for bad in (0, 3)]
        cases += [
            (parted, path, clips, rank)
            for path in ("fused", "general")
            for clips, rank in ((False, 0), (True, 3))
        ]
    return cases


def work(rank: int, folder: str, size: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/s", rank=rank, world_size=int(size))
    found = []
    for case, *options in cases_of(int(size)):
        result = case(rank, *options)
        found.append((case.__name__, options, result))
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
