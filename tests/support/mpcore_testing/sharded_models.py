"""Models that are made, run or compiled in a way of their own before they are sharded by rows."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import distribute_tensor

from mpcore_testing.rank_layouts import LAYOUTS, course_of, make_model

#: how a model is made; "all" of them in one
KINDS = ("meta", "checkpointed", "compiled", "all")


def made(rank: int, kind: str, dtype: str, path: str, way: str, bad: int) -> dict[str, Any]:
    """Trains; returns what `rank_layouts.trained` does, and what the kind has to show for itself.

    Those are: whether weights were without values when they were sharded, how often the layers of
    the block saw an input, how many graphs were compiled.
    """
    passes = 0

    def count(module: nn.Module, inputs: Any) -> None:
        nonlocal passes
        passes += 1

    torch.set_num_threads(1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    number_type = getattr(torch, dtype)
    if kind in ("meta", "all"):
        with torch.device("meta"):
            model: Any = make_model(number_type)
    else:
        model = make_model(number_type)
    if kind == "checkpointed":  # a compiled block has no hook between its operations
        model[1].norm.register_forward_pre_hook(count)
    if kind in ("checkpointed", "all"):
        model[1] = checkpoint_wrapper(model[1])
    if kind in ("compiled", "all"):
        model[1] = torch.compile(model[1], backend="aot_eager")
    LAYOUTS["fsdp"](model)
    empty = all(param.is_meta for param in model.parameters())
    if empty:
        model.to_empty(device="cpu")
        fill(model, make_model(number_type))
    setting = (dtype, path, "AdamW", way)
    course = course_of(model, rank, setting, overflows=rank == bad)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {**course, "empty": empty, "passes": passes, "graphs": graphs}


@torch.no_grad()
def fill(model: nn.Module, values: nn.Module) -> None:
    """Gives shards the values of a whole model."""
    for param, value in zip(model.parameters(), values.parameters(), strict=True):
        shard: Any = param
        source: Tensor = value.detach()
        shard.copy_(distribute_tensor(source, shard.device_mesh, shard.placements))


def cases_of(last: int) -> list[tuple[Any, ...]]:
    """Compiling takes seconds, so that few cases do."""
    return [
        *((made, kind, "float16", "fused", "", last) for kind in KINDS[:3]),
        *((made, kind, "bfloat16", "fused", "clip", 0) for kind in ("meta", "checkpointed", "all")),
        *((made, "checkpointed", "float16", path, "clip", last) for path in ("general", "mixed")),
        *((made, "meta", "float16", path, "clip", last) for path in ("general", "mixed")),
        *((made, "checkpointed", "bfloat16", "fused", w, 0) for w in ("unscale", "accumulate")),
    ]
