"""Tensors in whatever batches and outputs are made of: containers, dataclasses, any object."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

#: Objects that hold no data of a batch, whatever their attributes are.
_OPAQUE = (type, nn.Module, types.ModuleType, types.FunctionType, types.MethodType, str, bytes)
_DEEPEST = 12


def tensors_in(value: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """Returns each tensor with its place, as Python spells it; no host sync.

    Looks into tuples, lists, sets, mappings, dataclasses, and the attributes of other objects.

    Args:
        value: Any.
        name: Of `value` itself.

    Example:
        >>> import torch
        >>> [name for name, _ in tensors_in({"a": (1, torch.ones(1))}, "batch")]
        ["batch['a'][1]"]
    """
    return list(_walk(value, name, set(), _DEEPEST))


def _walk(value: Any, name: str, seen: set[int], left: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif left and id(value) not in seen:
        seen.add(id(value))
        for part, _, item in _items(value):
            yield from _walk(item, name + part, seen, left - 1)


def _items(value: Any) -> Iterable[tuple[str, Any, Any]]:
    """Returns what `value` holds: how Python spells its place, key or name, and the thing."""
    if value is None or isinstance(value, (bool, int, float, complex, *_OPAQUE)):
        return ()
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", key, item) for key, item in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        pairs = zip(value._fields, value, strict=True)
        return [(f".{field}", at, item) for at, (field, item) in enumerate(pairs)]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(f"[{at}]", at, item) for at, item in enumerate(value)]
    return [(f".{name}", name, getattr(value, name)) for name in _attributes(value)]


def _attributes(value: Any) -> list[str]:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    else:
        slots = getattr(type(value), "__slots__", ())
        names = [slots] if isinstance(slots, str) else list(slots)
    names += vars(value) if hasattr(value, "__dict__") else ()
    return [name for name in dict.fromkeys(names) if hasattr(value, name)]


def with_changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns `value` with other tensors in place; what holds none is the same object.

    Args:
        value: Any.
        change: Takes a tensor, returns one; called once for each, however often it occurs.

    Example:
        >>> import torch
        >>> x = torch.ones(1)
        >>> both = with_changed([x, {"again": x}], lambda tensor: tensor + 1)
        >>> both[0], both[0] is both[1]["again"]
        (tensor([2.]), True)
    """
    return _changed(value, change, {}, _DEEPEST)


def _changed(
    value: Any, change: Callable[[Tensor], Tensor], done: dict[int, Any], left: int
) -> Any:
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, Tensor):
        result = change(value)
    elif not left:
        return value
    else:
        done[id(value)] = value, value  # for what holds itself
        others = {}
        for _, key, item in _items(value):
            new = _changed(item, change, done, left - 1)
            if new is not item:
                others[key] = new
        result = _rebuilt(value, others) if others else value
    done[id(value)] = value, result  # `value` stays alive, so that no other object has its id
    return result


def _rebuilt(value: Any, others: dict[Any, Any]) -> Any:
    if isinstance(value, (tuple, set, frozenset)):
        items = [others.get(at, item) for at, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return {**value, **others}
    result = copy.copy(value)
    for key, item in others.items():
        if isinstance(value, (list, MutableMapping)):
            result[key] = item
        else:
            object.__setattr__(result, key, item)  # also where a dataclass is frozen
    return result
