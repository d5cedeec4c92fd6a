"""What a forward pass writes to, and in FP32 what it would have written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpcore.base import SIXTEEN_BIT
from mpcore.precision.weak import bounded


class WriteWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes writes to tensors while it is entered, through views, `.data` and `detach()` too.

    Every write is done a second time, in FP32 and beginning from what the tensor held in FP32, so
    that nothing is lost of a pass that writes to a 16-bit tensor. No sync, and no copy of what
    nobody writes to.

    Args:
        watched: What to watch, by name.
        originals: The FP32 values of some of these.

    Attributes:
        shadows: What those that were written would hold in FP32.

    Example:
        >>> counter = torch.full((2,), 256.0, dtype=torch.bfloat16)
        >>> with WriteWatch({"counter": counter}, {}) as watch:
        ...     _ = counter.data.add_(1)
        >>> counter.tolist(), watch.shadows["counter"].tolist()
        ([256.0, 256.0], [257.0, 257.0])
    """

    supports_higher_order_operators = True

    def __init__(self, watched: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched = watched
        self._originals = originals
        self._names = {_storage(t): name for name, t in watched.items() if _has_storage(t)}
        self.shadows: dict[str, Tensor] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operation, and once more where it writes to what is watched."""
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)  # of a higher order: what it calls comes by itself
        targets = [_argument(key, args, kwargs) for key in _written(func)]
        targets += _statistics(func, args, kwargs)
        names = [name for target in _flat(targets) if (name := self._name(target)) is not None]
        for name in names:
            if name not in self.shadows:
                watched = self._watched[name].detach()
                self.shadows[name] = in_fp32(watched, self._originals.get(name))
        # what draws random numbers would draw others the second time
        copies = torch.Tag.nondeterministic_seeded in func.tags or not all(map(self._fits, names))
        if names and not copies:
            func(*self._in_fp32(args), **self._in_fp32(kwargs))
        result = func(*args, **kwargs)
        if copies:
            for name in names:
                self.shadows[name].copy_(self._watched[name])
        return result

    def _fits(self, name: str) -> bool:
        return self.shadows[name].stride() == self._watched[name].stride()

    def _name(self, value: Any) -> str | None:
        is_known = isinstance(value, Tensor) and _has_storage(value)
        return self._names.get(_storage(value)) if is_known else None

    def _in_fp32(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            name = self._name(value)
            if name in self.shadows and value.dtype == self._watched[name].dtype:
                shadow, watched = self.shadows[name], self._watched[name]
                offset = value.storage_offset() - watched.storage_offset()
                return shadow.as_strided(value.shape, value.stride(), offset)
            return value.float() if value.dtype in SIXTEEN_BIT else value
        if isinstance(value, dict):
            return {key: self._in_fp32(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return type(value)([self._in_fp32(item) for item in value])
        return value


def in_fp32(tensor: Tensor, original: Tensor | None) -> Tensor:
    """Returns what a 16-bit tensor holds in FP32, in new memory; syncs if there is an original.

    Args:
        tensor: Any.
        original: What it was rounded from, if it still is that.

    Example:
        >>> original = torch.tensor([0.1])
        >>> torch.equal(in_fp32(original.half(), original), original)
        True
    """
    if original is not None:
        original = original.to(tensor.device)
        if torch.equal(bounded(original, tensor.dtype).to(tensor.dtype), tensor):
            return original.clone()
    return tensor.float().clone()


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _flat(values: list[Any]) -> list[Any]:
    """Returns the items of a list in which lists of tensors may stand."""
    return [each for v in values for each in (v if isinstance(v, tuple | list) else (v,))]


def _argument(key: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(key, str):
        return kwargs.get(key)
    return args[key] if key < len(args) else None


def _statistics(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Returns the running statistics that a batch norm writes, of which its schema says nothing."""
    places = _places(func)
    if "running_mean" not in places:
        return []
    given = {name: _argument(key, args, kwargs) for name, key in places.items()}
    if not (given.get("training") or given.get("train")):
        return []
    return [given["running_mean"], given["running_var"]]


@cache
def _places(func: Any) -> dict[str, int | str]:
    """Returns where each argument of an operation is: a place, or a name."""
    arguments = enumerate(func._schema.arguments)
    return {a.name: a.name if a.kwarg_only else place for place, a in arguments}


@cache  # a model asks for each of its operations
def _written(func: Any) -> tuple[int | str, ...]:
    """Returns the arguments that an operation writes, by place or by name."""
    found: list[int | str] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(argument.name if argument.kwarg_only else place)
    return tuple(found)
