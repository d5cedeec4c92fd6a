"""Casts at module borders: what keeps 16-bit modules and FP32 islands on speaking terms.

The hooks are values (frozen, compared by content), so that a model which carries them can be
pickled, deep-copied and compiled, and a second cast can tell what the first one did.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.base import FULL_PRECISION, SIXTEEN_BIT
from mpcore.precision.weak import WeakTensor, plain

_FLOATING = frozenset({*SIXTEEN_BIT, *FULL_PRECISION})


def cast_tensors(value: Any, sources: frozenset[torch.dtype], dtype: torch.dtype) -> Any:
    """Returns `value` with its tensors of a type in `sources` cast to `dtype`; no sync.

    Looks into tuples, lists, mappings and dataclasses, nested in any way. Whatever holds nothing
    to cast is handed back as the same object, and a tensor that occurs twice is cast once, so that
    `query is key` stays true.

    Example:
        >>> import torch
        >>> mask = torch.tensor([True])
        >>> x, options = cast_tensors(
        ...     (torch.ones(1), {"mask": mask}), frozenset({torch.float32}), torch.float16
        ... )
        >>> x.dtype, options["mask"] is mask
        (torch.float16, True)
    """
    return _Pass(sources, dtype).cast(value)[0]


def named_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Returns the tensors among arguments, with names such as `args[0]` and `mask['x']`; no sync.

    Example:
        >>> import torch
        >>> [name for name, _ in named_tensors((torch.ones(1),), {"b": {"x": [torch.ones(1)]}})]
        ['args[0]', "b['x'][0]"]
    """
    found: list[tuple[str, Tensor]] = []

    def walk(name: str, value: Any, ancestors: tuple[int, ...]) -> None:
        if isinstance(value, Tensor):
            found.append((name, value))
        elif (isinstance(value, tuple) or _is_container(value)) and id(value) not in ancestors:
            for key, item in _items(value):
                walk(f"{name}[{key!r}]", item, (*ancestors, id(value)))

    for index, value in enumerate(args):
        walk(f"args[{index}]", value, ())
    for name, value in kwargs.items():
        walk(name, value, ())
    return found


class _Pass:
    """One walk over a nest of containers.

    Tells changes by flags and tensors by `is` in a list, since `torch.compile` traces neither the
    identity of tuples nor `id` nor weak maps.
    """

    def __init__(self, sources: frozenset[torch.dtype], dtype: torch.dtype) -> None:
        self._sources = sources
        self._dtype = dtype
        self._done: list[tuple[Tensor, Tensor]] = []
        self._ancestors: list[Any] = []

    def cast(self, value: Any) -> tuple[Any, bool]:
        """Returns the cast value, and whether it differs from `value`."""
        if isinstance(value, Tensor):
            return self._cast_tensor(value)
        if isinstance(value, tuple):
            changed = self._cast_items(value)
            return (_with_items(value, changed), True) if changed else (value, False)
        if not _is_container(value) or any(ancestor is value for ancestor in self._ancestors):
            return value, False
        self._ancestors.append(value)
        changed = self._cast_items(value)
        self._ancestors.pop()
        return (_with_items(value, changed), True) if changed else (value, False)

    def _cast_items(self, container: Any) -> dict[Any, Any]:
        changed = {}
        for key, old in _items(container):
            new, differs = self.cast(old)
            if differs:
                changed[key] = new
        return changed

    def _cast_tensor(self, tensor: Tensor) -> tuple[Tensor, bool]:
        if tensor.dtype == self._dtype or tensor.dtype not in self._sources:
            return tensor, False
        for old, new in self._done:
            if old is tensor:
                return new, True
        result = self._convert(tensor)
        self._done.append((tensor, result))
        return result, True

    def _convert(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype)


class _InputPass(_Pass):
    """A walk over the inputs of a module that becomes 16-bit."""

    def __init__(self, dtype: torch.dtype, vectors: bool) -> None:
        super().__init__(_FLOATING, dtype)
        self._vectors = vectors

    def _cast_tensor(self, tensor: Tensor) -> tuple[Tensor, bool]:
        if self._vectors:
            return super()._cast_tensor(tensor)
        if isinstance(tensor, WeakTensor):
            return tensor, False
        # timesteps, lengths, weights of edges: like buffers that stay in FP32
        if tensor.dim() < 2 and tensor.dtype in FULL_PRECISION:
            if type(tensor) is not Tensor or torch.compiler.is_compiling():
                return tensor, False
            return tensor.as_subclass(WeakTensor), True
        return super()._cast_tensor(tensor)

    def _convert(self, tensor: Tensor) -> Tensor:
        tensor = plain(tensor)
        if self._dtype not in SIXTEEN_BIT:
            return tensor.to(self._dtype)
        # a mask of -1e9 stays one; what carries gradients is no mask, and what is too large for
        # the format has to be seen
        is_dense = tensor.layout == torch.strided and not tensor.is_nested
        narrow = tensor.to(self._dtype)
        if is_dense and not tensor.requires_grad:
            too_low = (narrow == -torch.inf) & (tensor != -torch.inf)
            narrow = torch.where(too_low, torch.finfo(self._dtype).min, narrow)
        return narrow


def _is_container(value: Any) -> bool:
    """Tells whether `_items` and `_with_items` can take `value` apart; a class is no instance."""
    if isinstance(value, type):
        return False
    return isinstance(value, list | MutableMapping) or dataclasses.is_dataclass(value)


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    """Returns what a container holds, with the keys that `_with_items` takes."""
    if isinstance(value, list | tuple):
        return enumerate(value)
    if isinstance(value, MutableMapping):
        return value.items()
    names = (field.name for field in dataclasses.fields(value))
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]


def _with_items(value: Any, changed: dict[Any, Any]) -> Any:
    """Returns a copy of a container in which the items of `changed` take the place of the old."""
    if isinstance(value, tuple):
        items = (changed.get(index, item) for index, item in enumerate(value))
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    # torch.compile traces the copies of plain lists and dicts, and no other
    result = value.copy() if type(value) in (list, dict) else copy.copy(value)
    for key, item in changed.items():
        if isinstance(value, list | MutableMapping):
            result[key] = item
        else:
            object.__setattr__(result, key, item)  # also where the dataclass is frozen
    return result


@dataclasses.dataclass(frozen=True)
class CastInputs:
    """A forward pre-hook (with keyword arguments): casts floating inputs to `dtype`.

    In 16 bits finite values below the range become the lowest finite one, unless they carry
    gradients.

    Attributes:
        dtype: What to cast to.
        vectors: Whether inputs of one dimension or none are cast too. Else they stay as they are,
            and give way to the 16-bit tensors that they meet (`WeakTensor`), as does what came of
            others that did.
    """

    dtype: torch.dtype
    vectors: bool = True

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments, cast."""
        args, kwargs = _InputPass(self.dtype, self.vectors).cast((args, kwargs))[0]
        return args, kwargs

    def rounds(self, tensor: Tensor) -> bool:
        """Tells whether a tensor among the inputs is rounded."""
        is_longer = tensor.dtype in _FLOATING and tensor.dtype != self.dtype
        return is_longer and (self.vectors or tensor.dim() > 1)


class _PlainPass(_Pass):
    """A walk over the results of a model."""

    def __init__(self) -> None:
        super().__init__(frozenset(), torch.float32)

    def _cast_tensor(self, tensor: Tensor) -> tuple[Tensor, bool]:
        return plain(tensor), isinstance(tensor, WeakTensor)


def plain_tensors(value: Any) -> Any:
    """Returns `value` with its weak tensors as torch's own; no sync.

    Example:
        >>> import torch
        >>> type(plain_tensors([torch.ones(2).as_subclass(WeakTensor)])[0]).__name__
        'Tensor'
    """
    return _PlainPass().cast(value)[0]


@dataclasses.dataclass(frozen=True)
class CastOutputs:
    """A forward hook: casts FP16, BF16 and FP32 outputs to `dtype`."""

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Returns the output, cast."""
        return cast_tensors(output, _FLOATING - {torch.float64}, self.dtype)


Hooks = tuple[CastInputs | None, CastOutputs | None]


def hooks_of(module: nn.Module) -> Hooks:
    """Returns the cast hooks that a module carries, those of its inputs first."""
    before = [hook for hook in module._forward_pre_hooks.values() if type(hook) is CastInputs]
    after = [hook for hook in module._forward_hooks.values() if type(hook) is CastOutputs]
    return (before[0] if before else None), (after[0] if after else None)


def is_rounded(model: nn.Module, tensor: Tensor) -> bool:
    """Tells whether a model rounds a tensor that it is given to 16 bits."""
    before, _ = hooks_of(model)
    is_dense = tensor.layout == torch.strided and not tensor.is_nested
    return is_dense and tensor.numel() > 0 and before is not None and before.rounds(tensor)


def attach(module: nn.Module, hooks: Hooks) -> None:
    """Gives a module those of `hooks` that it does not carry yet."""
    present = hooks_of(module)
    before, after = hooks
    if before is not None and present[0] is None:
        module.register_forward_pre_hook(before, with_kwargs=True)
    if after is not None and present[1] is None:
        module.register_forward_hook(after)
