"""What ranks are told, in one process: the numbers of a second rank are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import mpcore
import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.join import Join

Pair = tuple[Callable[[], Any], Callable[[], Any]]


@contextmanager
def _world(of_the_other: Callable[[Tensor], Tensor], other_masters: bool = False) -> Iterator[None]:
    """A process group of this process, which believes that there is another rank."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def reduced(numbers: Tensor, group: Any, operation: Any, *, purpose: Any) -> Tensor:
        return numbers + of_the_other(numbers)

    def gathered(numbers: list[int], group: Any, *, purpose: Any) -> list[tuple[int, ...]]:
        if len(numbers) == 1:
            return [tuple(numbers)] * 2
        layout, value = numbers
        return [(layout, value), (layout, value + other_masters)]

    try:
        with (
            patch("mpcore.ranks.agreement.reduced", reduced),
            patch("mpcore.ranks.shares.gathered", gathered),
            patch("mpcore.ranks.agreement.gathered", gathered),
            patch("torch.distributed.get_world_size", lambda group=None: 2),
        ):
            yield
    finally:
        distributed.destroy_process_group()


def _made() -> tuple[nn.Parameter, Any]:
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    inner = torch.optim.SGD([weight], lr=0.5)
    scaling = mpcore.DynamicLossScale(2.0**6)
    return weight, mpcore.MixedPrecisionOptimizer(inner, scaling, ranks=mpcore.Ranks())


def _alike(numbers: Tensor) -> Tensor:
    """Another rank found what this one did."""
    return numbers


def _steps(weight: nn.Parameter, optimizer: Any) -> None:
    before = weight.detach().clone()
    optimizer.backward(weight.float().sum())
    optimizer.step()
    assert not torch.equal(weight, before)


def other_masters() -> Pair:
    """Copies that are none: weights are broadcast before the optimizer is made."""

    def provoke() -> None:
        with _world(_alike, other_masters=True):
            _steps(*_made())

    def follow() -> None:
        with _world(_alike):
            _steps(*_made())

    return provoke, follow


def other_scale() -> Pair:
    """Another rank has another scale; one checkpoint is loaded on all."""

    def ahead(numbers: Tensor) -> Tensor:
        other = numbers.clone()
        own, squares = other[-8:-4], other[-4:]
        own += 1
        squares.copy_(own * own)
        return other

    kept: dict[str, Any] = {}

    def provoke() -> None:
        with _world(ahead):
            weight, optimizer = _made()
            kept.update(weight=weight, state=optimizer.state_dict())
            _steps(weight, optimizer)

    def follow() -> None:
        with _world(_alike):
            _, optimizer = _made()
            (weight,) = optimizer.param_groups[0]["params"]
            optimizer.load_state_dict(kept["state"])
            _steps(weight, optimizer)

    return provoke, follow


def no_scale() -> Pair:
    """No rank has scaled the loss; gradients are cleared, and the loss goes through backward()."""
    kept: list[Any] = []

    def provoke() -> None:
        with _world(_alike):
            kept[:] = weight, optimizer = _made()
            weight.float().sum().backward()
            optimizer.step()

    def follow() -> None:
        weight, optimizer = kept
        with _world(_alike):
            optimizer.zero_grad()
            _steps(weight, optimizer)

    return provoke, follow


def several_passes() -> Pair:
    """Ranks that may run out of batches cannot tell how often to answer; all have as many."""

    def sum_up(optimizer: Any) -> None:
        (weight,) = optimizer.param_groups[0]["params"]
        optimizer.backward(weight.float().sum())
        optimizer.accumulate()

    def provoke() -> None:
        with _world(_alike), patch("torch.distributed.get_world_size", lambda group=None: 1):
            ddp = nn.parallel.DistributedDataParallel(nn.Linear(2, 1, bias=False).half())
            inner = torch.optim.SGD(ddp.parameters(), lr=0.5)
            scaling = mpcore.DynamicLossScale(2.0**6)
            optimizer = mpcore.MixedPrecisionOptimizer(inner, scaling, ranks=mpcore.Ranks())
            with Join([ddp, optimizer]):
                sum_up(optimizer)

    def follow() -> None:
        with _world(_alike):
            weight, optimizer = _made()
            before = weight.detach().clone()
            sum_up(optimizer)
            optimizer.step()
            assert not torch.equal(weight, before)

    return provoke, follow
