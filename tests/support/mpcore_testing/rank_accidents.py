"""What happens to ranks that act as one: each runs on every rank and returns what it saw."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import mpcore
import torch
from torch import distributed

from mpcore_testing.rank_cases import SCALE, pass_over, seen, values, wrapped


def refused(rank: int, what: str) -> str:
    """What each rank is told."""
    params = values((4, 2), seed=rank if what == "other masters" else 0)
    scale = SCALE * (1 + (rank == 1) * (what == "other scale"))
    optimizer = wrapped(params, "fused", scaling=mpcore.DynamicLossScale(scale))
    if what == "no scale":
        for param in params:
            param.grad = torch.ones_like(param)
    else:
        pass_over(optimizer, params, 0.5)
    try:
        optimizer.step()
    except mpcore.StageError as error:
        masters = [optimizer.state[p]["master"].tolist() for p in params if p in optimizer.state]
        assert masters in ([], [p.detach().float().tolist() for p in params])  # nothing has moved
        return str(error)
    return "stepped"


def warned(rank: int) -> list[str]:
    """What is said to whom nobody told of the other ranks."""
    params = values((4,), seed=0)
    optimizer = wrapped(params, "fused", ranks=None)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(2):
            pass_over(optimizer, params, 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return [str(warning.message) for warning in heard]


def behind(rank: int, kind: str) -> str:
    """What is said to whom wraps an optimizer that writes to weights behind masters."""
    from torch.distributed import optim
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    params = values((4,), seed=0)
    if kind == "ZeroRedundancyOptimizer":
        inner: Any = optim.ZeroRedundancyOptimizer(params, torch.optim.SGD, lr=0.5)
    else:
        averager = PeriodicModelAverager(period=1)
        inner = optim.PostLocalSGDOptimizer(torch.optim.SGD(params, lr=0.5), averager)
    try:
        mpcore.MixedPrecisionOptimizer(inner)
    except mpcore.ArgumentError as error:
        return str(error)
    return "wrapped"


def not_there_yet(rank: int, what: str) -> str:
    """What ranks cannot agree about is an error, and leaves the optimizer usable."""
    params = values((4,), seed=0)
    headroom = mpcore.HeadroomLossScale(SCALE)
    optimizer = wrapped(params, "fused", scaling=headroom)
    pass_over(optimizer, params, 0.5)
    told = "nothing"
    try:
        if what == "add_loss":
            optimizer.add_loss("other", mpcore.NoLossScale())
        else:
            optimizer.accumulate()
            optimizer.step()
    except mpcore.ArgumentError as error:
        told = str(error)
    if what == "accumulate":
        optimizer.zero_grad()
        pass_over(optimizer, params, 0.5)
    optimizer.step()
    assert not optimizer.last_step.skipped
    return told


def copied(rank: int) -> Any:
    """A copy of an optimizer agrees with the copies of the others."""
    group = distributed.new_group(list(range(distributed.get_world_size())))
    params = values((4,), seed=0)
    optimizer = wrapped(params, "fused", ranks=mpcore.Ranks(group))
    pass_over(optimizer, params, 0.5)
    optimizer.step()
    optimizer.zero_grad()
    copies_of = copy.deepcopy((params, optimizer))
    for each, other in ((params, optimizer), copies_of):
        pass_over(other, each, 0.5, bad=rank == 1)
        other.clip_grad_norm_(1.0)
        other.step()
    return [seen(other, each) for each, other in ((params, optimizer), copies_of)]


def reported(rank: int) -> str:
    """What a monitor says of a step that rank 1 has spoilt."""
    params = values((4, 2 + rank), seed=rank)
    optimizer = wrapped(params, "fused")
    monitor = mpcore.Monitor(optimizer)
    pass_over(optimizer, params, 0.5, bad=rank == 1)
    optimizer.step()
    return str(monitor.report())


def dropped(rank: int) -> Any:
    """`unscale_`, and a loop that steps only if all is finite; then a step."""
    params = values((4, 2), seed=0)
    optimizer = wrapped(params, "fused")
    for step in range(2):
        pass_over(optimizer, params, 0.5, bad=step == 0 and rank == 1)
        optimizer.unscale_()
        if step:
            optimizer.step()
        optimizer.zero_grad()
    return optimizer.loss_scale, optimizer.steps, optimizer.skipped_steps


def thawed(rank: int, way: str) -> Any:
    """A parameter that comes later: unfrozen, or of a group that is added."""
    first, second = values((4, 3), seed=0)
    second.requires_grad_(way != "unfrozen")
    optimizer = wrapped([first, second] if way == "unfrozen" else [first], "fused")
    for step in range(3):
        if step == 1 and way == "unfrozen":
            second.requires_grad_()
        if step == 1 and way == "added":
            optimizer.add_param_group({"params": [second]})
        pass_over(optimizer, [first, second] if step else [first], 0.5, bad=step == 2 and not rank)
        optimizer.clip_grad_norm_(0.25)
        optimizer.step()
        optimizer.zero_grad()
    return seen(optimizer, [first, second])


def zeros_first(rank: int) -> Any:
    """All gradients of rank 0 are 0 in the first step: as before training, but not everywhere."""
    params = values((4, 2 + rank), seed=rank)
    optimizer = wrapped(params, "fused")
    for step in range(2):
        if rank == 0 and step == 0:
            for param in params:
                param.grad = torch.zeros_like(param)
        else:
            pass_over(optimizer, params, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.steps, optimizer.loss_scale


def lacking(rank: int) -> Any:
    """Sums of a parameter that only rank 1 has a gradient of."""
    params = values((4, 2), seed=0)
    optimizer = wrapped(params, "fused", scaling=mpcore.StaticLossScale(SCALE))
    before = params[1].detach().float().tolist()
    pass_over(optimizer, params if rank else params[:1], 0.5)
    optimizer.accumulate()
    optimizer.step()
    found = optimizer.state[params[1]]["master"].tolist()
    return [(a - b) / a for a, b in zip(before, found, strict=True)]
