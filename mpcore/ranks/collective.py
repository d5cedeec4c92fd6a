"""Collectives of a few numbers, on whatever device a process group can reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from mpcore.errors import RankError


def reduced(numbers: Tensor, group: Any, operation: Any, *, purpose: Callable[[], str]) -> Tensor:
    """Returns numbers of the ranks of a group, reduced; waits for the others. `numbers` stays.

    Args:
        numbers: Of this rank.
        group: A `torch.distributed.ProcessGroup`; None: all ranks.
        operation: A `torch.distributed.ReduceOp`.
        purpose: Returns what it is for and when, for the message of an error.

    Raises:
        RankError: The collective failed.
    """
    shared = numbers.to(_within_reach(group, numbers.device), copy=True)
    with naming_failures(group, purpose):
        distributed.all_reduce(shared, operation, group)
    return shared.to(numbers.device)


def gathered(
    numbers: list[int], group: Any, *, purpose: Callable[[], str]
) -> list[tuple[int, ...]]:
    """Returns the integers of each rank of a group; waits for the others and for the device.

    Args:
        numbers: Of this rank; as many on each.
        group: As for `reduced`.
        purpose: Likewise.

    Raises:
        RankError: The collective failed.
    """
    home = _within_reach(group, torch.device("cpu"))
    own = torch.tensor(numbers, dtype=torch.int64, device=home)
    every = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    with naming_failures(group, purpose):
        distributed.all_gather(every, own, group)
    return [tuple(each.tolist()) for each in every]


@contextmanager
def naming_failures(
    group: Any,
    purpose: Callable[[], str],
    left: str = "The update of this step was not made.",
) -> Iterator[None]:
    """Says which collective it was that failed, and what can be done.

    Args:
        group: As for `reduced`.
        purpose: Likewise.
        left: How all is when it fails.

    Raises:
        RankError: The collective failed.
    """
    try:
        yield
    except NotImplementedError:
        raise  # no rank is to blame
    except RuntimeError as error:
        size, said = distributed.get_world_size(group), str(error).rstrip(".")
        raise RankError(
            f"{purpose()}: expected an answer of all {size} ranks, got: {said}. {left} A rank has "
            "ended or is late: start the ranks again, as many as there are, and load the last "
            "checkpoint."
        ) from error


def _within_reach(group: Any, device: torch.device) -> torch.device:
    """Returns a device whose tensors a group exchanges, the given one if it can be."""
    # "cpu:gloo,cuda:nccl" of a group that was made without naming a backend
    parts = distributed.get_backend_config(group).split(",")
    backends = dict(part.split(":") for part in parts)
    own = backends.get(device.type)
    # gloo takes CUDA tensors for some operations only
    if own is not None and (device.type == "cpu" or own != "gloo"):
        return device
    if "cpu" in backends:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
