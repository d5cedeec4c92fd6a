"""Ranks that run out of batches, under `Join([ddp, optimizer])`; run on each rank of one group."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import mpcore
import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.join import Join

from mpcore_testing.rank_cases import wrapped
from mpcore_testing.rank_layouts import make_model, state_of, take_step

BAD = 2  # the step whose gradients overflow, on one rank, after they were reduced
AFTER = 2  # steps that all ranks take once they have joined
WAYS = ("", "clip", "unscale", "both")


def batch(rank: int, step: int) -> Tensor:
    return (torch.arange(32.0).view(8, 4) / 32 + step) * (1 + rank)


def joined(rank: int, path: str, way: str, counts: tuple[int, ...], bad: int) -> Any:
    """Trains `counts[rank]` batches and then two together; returns gradients and what became."""
    model = make_model(torch.float16)
    optimizer = wrapped(model.named_parameters(), path, "AdamW")
    ddp = nn.parallel.DistributedDataParallel(model)
    found: list[Any] = []

    def train(step: int) -> None:
        def evaluate() -> None:
            loss = ddp(batch(rank, step).half()).float().square().mean()
            optimizer.backward(loss)
            grads = [param.grad for param in model.parameters()]
            if step == BAD and rank == bad:
                grads[0].view(-1)[0] = torch.inf
            found.append({"grads": [grad.clone() for grad in grads]})

        norm = take_step(optimizer, model, evaluate, way)
        found[-1] |= {"norm": norm, **state_of(model, optimizer)}

    with Join([ddp, optimizer]):
        for step in range(counts[rank]):
            train(step)
    end = len(found), optimizer.check_masters(), whole_state(optimizer)
    for step in range(max(counts), max(counts) + AFTER):
        train(step)
    return {"steps": found, "end": end, "last": whole_state(optimizer)}


def whole_state(optimizer: Any) -> Any:
    state = optimizer.state_dict()
    return {"state": state["state"], "mpcore": str(state["mpcore"])}


def refused(rank: int, what: str) -> str:
    """What every rank is told where a rank without batches could not answer, or not be known."""
    model = nn.Linear(4, 2).half()
    options: dict[str, Any] = {
        "no ranks": {"ranks": None},
        "experts": {"ranks": mpcore.Ranks(replicas={"*": None})},
    }.get(what, {})
    optimizer = wrapped(model.parameters(), "fused", "SGD", **options)
    ddp = nn.parallel.DistributedDataParallel(model)
    joinables = {"order": [optimizer, ddp], "alone": [ddp]}.get(what, [ddp, optimizer])

    def loss() -> Tensor:
        result: Tensor = ddp(torch.ones(2, 4).half()).float().mean()
        optimizer.backward(result)
        return result

    if what == "evaluated":  # a join that has ended says nothing of the steps that follow
        with Join([ddp]), torch.no_grad():
            ddp(torch.ones(2, 4).half())
        loss()
        optimizer.step()
        return "nothing"
    try:
        with Join(joinables):
            if what == "closure":
                optimizer.step(loss)
            loss()
            if what == "accumulate":
                optimizer.accumulate()
            optimizer.step()
    except mpcore.MpcoreError as error:
        return re.sub(r"\s+", " ", str(error))
    return "nothing"


REFUSED = ("no ranks", "experts", "order", "closure", "accumulate", "alone", "evaluated")
#: batches of each rank; the first ends first, the last does, and one has none at all
COUNTS = {2: ((2, 5), (5, 2), (0, 4)), 3: ((2, 5, 4), (4, 1, 4))}


def cases_of(size: int) -> list[tuple[Any, ...]]:
    first, *others = COUNTS[size]
    longest = first.index(max(first))
    cases: list[tuple[Any, ...]] = [
        (joined, path, way, first, longest) for path in ("fused", "general") for way in WAYS
    ]
    cases += [(joined, "mixed", "clip", counts, counts.index(max(counts))) for counts in others]
    return cases + ([(refused, what) for what in REFUSED] if size == 2 else [])


def work(rank: int, folder: str, size: str) -> None:
    distributed.init_process_group(
        "gloo",
        f"file://{folder}/s",
        rank=rank,
        world_size=int(size),
        timeout=timedelta(seconds=60),  # of ranks that no longer match
    )
    torch.set_num_threads(1)
    found = [
        (case.__name__, options, case(rank, *options)) for case, *options in cases_of(int(size))
    ]
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
