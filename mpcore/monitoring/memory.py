"""Which bytes an optimizer and its model keep, by what they hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from operator import mul
from typing import Any, Protocol

import torch
from torch import Tensor

from mpcore.masters import MASTER_KEYS, scales_of


class _Optimizer(Protocol):
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    @property
    def state(self) -> Mapping[Any, Any]: ...


@dataclass(frozen=True)
class Resident:
    """Bytes that stay in memory; what lives only inside a step or a backward pass is not counted.

    Attributes:
        parameters: Number of parameters.
        weights: Bytes of what the model computes with.
        gradients: Of their gradients.
        masters: Of what is kept of masters beside 16-bit weights: FP32 copies, or remainders.
        moments: Of full-size optimizer state, and of the scales of 8-bit moments.
        sums: Of what `accumulate` or several losses have added up for the step.

    Example:
        >>> Resident(10, weights=20, gradients=20, masters=40, moments=80).per_parameter
        16.0
    """

    parameters: int
    weights: int
    gradients: int
    masters: int
    moments: int
    sums: int = 0

    @property
    def total(self) -> int:
        """All five."""
        return self.weights + self.gradients + self.masters + self.moments + self.sums

    @property
    def per_parameter(self) -> float:
        """The total over the number of parameters."""
        return self.total / max(self.parameters, 1)


def accumulators(optimizer: _Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Pairs every parameter with the tensor that its updates accumulate in; no host sync.

    Args:
        optimizer: Its state's `master`, where there is one, is that tensor; otherwise the parameter
            is.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> [(parameter, accumulator)] = accumulators(torch.optim.SGD([weight], lr=0.1))
        >>> accumulator is weight
        True
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [(p, optimizer.state.get(p, {}).get("master", p)) for p in parameters]


def resident_bytes(optimizer: _Optimizer) -> Resident:
    """Adds up the tensors that exist; no host sync.

    Call it between `backward` and `zero_grad`, so that gradients are there. Scalars (step counts,
    the loss scale) are left out.

    Args:
        optimizer: One that has stepped.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> resident_bytes(optimizer).per_parameter  # 4 weight + 4 gradient + 8 moments
        16.0
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nothing: dict[str, Any] = {}
    states = [optimizer.state.get(param, nothing) for param in parameters]
    sizes = list(map(Tensor.numel, parameters))
    masters: list[Tensor] = []
    moments: list[Tensor] = []
    scales = {scales_of(name) for name in set(chain.from_iterable(states))}
    for name in dict.fromkeys(chain.from_iterable(states)):  # a column is quicker than its rows
        there = [name in state for state in states]
        held = [state[name] for state in compress(states, there)]
        if name in MASTER_KEYS:
            masters += held
        elif name in scales:
            moments += [value for value in held if isinstance(value, Tensor)]
        else:
            moments += _as_large(held, compress(parameters, there), compress(sizes, there))
    # an FP32 gradient that an optimizer keeps on its master counts as a gradient
    gradients = [grad for t in (*parameters, *masters) if (grad := t.grad) is not None]
    return Resident(
        parameters=sum(sizes),
        weights=_bytes(parameters),
        gradients=_bytes(gradients),
        masters=_bytes(masters),
        moments=_bytes(moments),
    )


def _as_large(
    values: Sequence[Any], params: Iterable[Tensor], sizes: Iterable[int]
) -> list[Tensor]:
    """Returns the tensors of the size of a parameter; a step count is not of that of a number."""
    return [  # a shape would be an object to be made, ten times as slow
        value
        for value, param, size in zip(values, params, sizes, strict=True)
        if isinstance(value, Tensor)
        and value.numel() == size
        and (size > 1 or value.dim() == param.dim())
    ]


def bytes_of_sums(params: Iterable[Tensor]) -> int:
    """Returns what sums of the gradients of some parameters take: float32, or float64; no sync.

    Example:
        >>> bytes_of_sums([torch.ones(3).half(), torch.ones(1, dtype=torch.float64)])
        20
    """
    return sum(param.numel() * (8 if param.dtype == torch.float64 else 4) for param in params)


def _bytes(tensors: Collection[Tensor]) -> int:
    return sum(map(mul, map(Tensor.numel, tensors), map(Tensor.element_size, tensors)))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the storages behind `tensors`, each counted once; no host sync.

    Example:
        >>> whole = torch.ones(4)
        >>> storage_bytes([whole, whole[:2], torch.ones(1)])
        20
    """
    storages: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class SavedForBackward:
    """Counts bytes that autograd saves for the backward pass, from `start` to `stop`; no host sync.

    Each storage counts once; parameters and sparse tensors are left out. What is counted stays
    alive until then.

    Args:
        parameters: Their storages do not count.

    Example:
        >>> weight, values = torch.ones(3, requires_grad=True), torch.ones(3)
        >>> saved = SavedForBackward([weight])
        >>> saved.start()
        >>> result = (weight * values).exp()
        >>> saved.stop()  # values and the result
        24
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._own = {param.untyped_storage().data_ptr() for param in parameters}
        self._kept: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, _as_it_is)

    def start(self) -> None:
        """Begins to count."""
        self._hooks.__enter__()

    def stop(self) -> int:
        """Ends counting and returns the bytes."""
        self._hooks.__exit__()
        dense = [t for t in self._kept if t.layout == torch.strided]  # others have no one storage
        size = storage_bytes(t for t in dense if t.untyped_storage().data_ptr() not in self._own)
        self._kept.clear()
        return size

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor.detach())  # alive, so that no storage's address is used again
        return tensor


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
