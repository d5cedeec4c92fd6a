"""Finding host syncs, with and without a device.

On a CPU tensor `.item()` costs nothing, so a sync is only counted: `ScalarReads`. Under
`FakeTensorMode` tensors live on "cuda" without a GPU and have no values, so whatever needs a value
on the host raises there; `DeviceOnly` raises on the rest, which is copies. (Backward passes cannot
run there: autograd asks for a real device. Gradients are assigned instead.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: They run wholly on the device, write in place and return nothing; torch has no fake form of them.
_FUSED_WITHOUT_FAKE = {torch.ops.aten._fused_sgd_, torch.ops.aten._fused_adagrad_}
_READ = torch.ops.aten._local_scalar_dense.default


class HostSyncError(RuntimeError):
    """The host waited for the device."""


class _Lists(TorchFunctionMode):
    """Counts calls of `.tolist()` that no operation tells of: those of one dimension and more."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is Tensor.tolist and args[0].dim() > 0
        return func(*args, **(kwargs or {}))


class ScalarReads(TorchDispatchMode):
    """Counts reads of values by the host: `bool()`, `.item()`, `.tolist()`."""

    def __init__(self) -> None:
        super().__init__()
        self._lists = _Lists()
        self._values = 0

    @property
    def count(self) -> int:
        """How many there were."""
        return self._values + self._lists.count

    def __enter__(self) -> Any:
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._values += func is _READ
        return func(*args, **(kwargs or {}))


class DeviceOnly(TorchDispatchMode):
    """Raises `HostSyncError` when an operation makes the host wait for a CUDA device.

    That is reading a value, and any operation that has tensors of the host and of the device among
    its arguments and results, as copies have. Some of those would not wait (a "non-blocking" copy
    from pinned memory); a step needs none of them.

    Args:
        answer: What a read of a value on the device gives instead of raising; None raises.

    Attributes:
        reads: How many values on the device were read.
        operations: How many operations ran on the device.
    """

    def __init__(self, answer: Callable[[], float] | None = None) -> None:
        super().__init__()
        self.reads = 0
        self.operations = 0
        self._answer = answer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        taken = _devices((args, kwargs))
        self.operations += "cuda" in taken
        if func is _READ and "cuda" in taken:
            self.reads += 1
            if self._answer is None:
                raise HostSyncError("the host read a value of the device")
            return self._answer()
        fake = func.overloadpacket not in _FUSED_WITHOUT_FAKE
        result = func(*args, **kwargs) if fake else None
        involved = taken | _devices(result)
        if {"cpu", "cuda"} <= involved:
            raise HostSyncError(f"{func} has tensors of the host and of the device")
        return result


def _devices(values: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


@contextmanager
def fake_cuda(answer: Callable[[], float] | None = None) -> Iterator[DeviceOnly]:
    """Within it, tensors on "cuda" exist without a GPU, and host syncs raise."""
    with FakeTensorMode(), DeviceOnly(answer) as watch:
        yield watch


def steps_without_values(
    optimizer: Any, params: Sequence[Tensor], way: str, *, drops_one: bool = False
) -> None:
    """Takes three steps over gradients that nobody has to know, within `fake_cuda`.

    Args:
        optimizer: Over `params`.
        params: On "cuda".
        way: What comes before the step: "clip", "unscale", or "step" for nothing.
        drops_one: Whether the first parameter has no gradient in the second step.
    """
    for number in range(3):
        optimizer.scale(torch.empty((), device="cuda"))
        for param in params:
            param.grad = torch.empty_like(param)
        if drops_one and number == 1:
            params[0].grad = None
        if way == "clip":
            optimizer.clip_grad_norm_(1.0)
        elif way == "unscale":
            optimizer.unscale_()
        optimizer.step()
        optimizer.zero_grad()
