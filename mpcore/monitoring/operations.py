"""Every operation of torch while a batch runs: what went in and came out, where, on which line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpcore.monitoring.source_line import Line, line_now

#: What `torch.tensor(...)` ends with.
CONSTANT = "lift_fresh"
#: In-place operations that read nothing of what they write to.
_OVERWRITING = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "random_"})
_OVERWRITING |= {"bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_"}
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KNOWN = frozenset((*_REAL, torch.complex64, torch.complex128))


def values_of(tensor: Tensor) -> Tensor | None:
    """Returns the floating or complex values of a tensor; None if there are none to look at.

    Example:
        >>> values_of(torch.ones(2, dtype=torch.int64)) is None
        True
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None  # of vmap and the like: their values are seen one floor below
    if tensor.layout == torch.sparse_coo:
        tensor = tensor._values()
    if tensor.layout != torch.strided or tensor.dtype not in _KNOWN or tensor.is_meta:
        return None
    return tensor.detach() if tensor.numel() else None


class Place(NamedTuple):
    """Where something happens.

    Attributes:
        phase: "forward", "loss" or "backward".
        module: Name of the innermost module that runs; in the backward pass of the one that ran
            when what is differentiated was computed.
        line: Of somebody's code, if it is known; in the backward pass likewise.
        node: What is differentiated, by autograd's name; "" in the other phases.
    """

    phase: str
    module: str
    line: Line | None
    node: str = ""


@dataclass(frozen=True)
class Operation:
    """An operation that has run.

    Attributes:
        name: As in torch's schema; "cast to float16" for example if it changes the type.
        place: Where.
        pointwise: Whether each value comes of those at the same place.
        random: Whether it draws random numbers.
        writes: Whether it wrote to tensors that existed.
        constants: Numbers among its arguments.
        inputs: What it read, as it was before, by the tensors that were given.
        outputs: What it returned or wrote to.
    """

    name: str
    place: Place
    pointwise: bool
    random: bool
    writes: bool
    constants: tuple[complex, ...]
    inputs: tuple[tuple[Tensor, Tensor], ...]
    outputs: tuple[Tensor, ...]

    @property
    def is_view(self) -> bool:
        """Whether it only showed memory that there was already; no host sync."""
        if self.writes or self.name == CONSTANT:
            return False
        before = {memory_of(given) for given, _ in self.inputs}
        return all(memory_of(output) in before for output in self.outputs)


def memory_of(tensor: Tensor) -> int | None:
    """Returns where the values of a tensor are, None if nobody can tell; no host sync."""
    values = values_of(tensor)
    try:
        return None if values is None else values.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a subclass without memory of its own
        return None


class Whereabouts:
    """Keeps track of where a run is; the probe tells it.

    Args:
        outermost: What runs the batch: code further out is not the batch's.
    """

    def __init__(self, outermost: CodeType) -> None:
        self.phase = "forward"
        self.modules: list[str] = []
        self._outermost = outermost
        self._made: dict[int, Place] = {}  # by the number of the node that autograd made for it

    def now(self) -> Place:
        """Returns where the operation that runs is; no host sync."""
        line = line_now(self._outermost)
        here = "loss_of" if self.phase == "loss" else (self.modules or [""])[-1]
        if self.phase != "backward":
            place = Place(self.phase, here, line)
            # the last node is this operation's, or of one before that has its own entry
            self._made.setdefault(_last_node(), place)
            return place
        node = torch._C._current_autograd_node()
        if node is None:
            return Place("backward", "loss_of", line)
        number = node._sequence_nr()
        made = self._made.get(number)
        # what a checkpoint runs again makes nodes too, for a backward pass inside this one
        if line is not None:
            again = Place("backward", here if self.modules else "", line)
            self._made.setdefault(_last_node(), again)
        module = made.module if made is not None else (self.modules or ["loss_of"])[-1]
        at = line if line is not None else made.line if made is not None else None
        return Place("backward", module, at, node.name())


def _last_node() -> int:
    """Returns the number of the node that autograd made last in this thread."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number - 1


class OperationWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of every operation, those of the backward pass too; no host sync of its own.

    Memory that torch leaves uninitialised is 0 under it.

    Args:
        where: Where the run is.
        see: Gets each operation.
        save: Gets each tensor that is going to be written to, before.

    Example:
        >>> def seen() -> list[str]:
        ...     names = []
        ...     see = lambda operation: names.append(operation.name)
        ...     where = Whereabouts(seen.__code__)
        ...     with OperationWatch(where, see, lambda tensor: None):
        ...         torch.ones(2).half().exp()
        ...     return names
        >>> seen()
        ['ones', 'cast to float16', 'exp']
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        where: Whereabouts,
        see: Callable[[Operation], object],
        save: Callable[[Tensor], object],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._where = where
        self._see = see
        self._save = save
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Tells of nothing for a while."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation and tells of it."""
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if self._paused or schema is None:
            return func(*args, **kwargs)
        name = schema.name.rpartition("::")[2]
        written, unread = _written(schema, name, args, kwargs)
        for tensor in written:
            self._save(tensor)
        copied = {id(tensor) for tensor in written}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = tuple(
            (tensor, tensor.detach().clone() if id(tensor) in copied else tensor)
            for tensor in given
            if id(tensor) not in unread and values_of(tensor) is not None
        )
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name.startswith(("empty", "new_empty")):
            for tensor in outputs:
                tensor.zero_()
        constants = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, (float, int)))
        operation = Operation(
            name=_shown(name, outputs),
            place=self._where.now(),
            pointwise=torch.Tag.pointwise in func.tags or "copy" in name,
            random=torch.Tag.nondeterministic_seeded in func.tags,
            writes=bool(written),
            constants=tuple(constants),
            inputs=inputs,
            outputs=tuple(dict.fromkeys([*outputs, *written])),
        )
        self._see(operation)
        return result


def _written(
    schema: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[Tensor], set[int]]:
    """Returns tensors that are written to, and by `id` those of them that are not read."""
    written: list[Tensor] = []
    unread: set[int] = set()
    if not schema.is_mutable:
        return written, unread
    for at, argument in enumerate(schema.arguments):
        value = args[at] if at < len(args) else kwargs.get(argument.name)
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        written += tensors
        if argument.kwarg_only or name in _OVERWRITING:
            unread |= {id(tensor) for tensor in tensors}
    return written, unread


def _shown(name: str, outputs: Sequence[Tensor]) -> str:
    if name == "_to_copy" and outputs:
        return f"cast to {str(outputs[0].dtype).removeprefix('torch.')}"
    return name.lstrip("_")
