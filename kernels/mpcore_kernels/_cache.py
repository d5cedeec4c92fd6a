"""Tables kept from call to call, so that a step with the same tensors uploads nothing.

A cache belongs to whoever owns the tensors, usually through a `Launcher`; there is none behind the
back of the module-level functions.

A table is found again only if everything that it and the checks before it depend on is the same:
address, shape, strides, dtype, device, layout and negation of every tensor, in order. A table holds
nothing but that, so one that is found is never stale, and its checks need not be repeated. Tensors
freed and replaced by others at the same addresses are the same to a kernel.

Streams: a table is uploaded on the stream that is current when it is built, and used again on that
stream alone; on another one it is built anew.

CUDA graphs: a captured launch reads the table at its address again at every replay. So during a
capture a table must be found, not built: the upload would be replayed from memory that has another
use by then. The launcher raises otherwise. A table that a capture used stays for as long as the
cache lives, and its tensors must stay where they are, as for everything that a graph touches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# hashable, and equal exactly if a table may be used again
Key = tuple[Any, ...]

_PROPERTIES: tuple[Callable[[Tensor], Any], ...] = (
    *(attrgetter(name) for name in ("shape", "dtype", "device")),
    *(Tensor.data_ptr, Tensor.stride, Tensor.is_neg),
)
PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter}
_PLAIN_LAYOUTS = {torch.strided}


@dataclass(frozen=True)
class _Entry:
    value: Any
    stream: int


class TableCache:
    """Tables by the tensors that they are of; the least recently used one goes first.

    Args:
        capacity: How many tables are kept, those of CUDA graphs not counted. A training step needs
            one for each launcher, times the sets of addresses between which gradients alternate.

    Example:
        >>> cache, grads, built = TableCache(), [torch.zeros(3)], []
        >>> for _ in range(3):
        ...     _ = cached(cache, "demo", [grads], grads[0].device, lambda: built.append("table"))
        >>> built
        ['table']
    """

    def __init__(self, capacity: int = 32) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._held: list[_Entry] = []

    def __len__(self) -> int:
        """Returns how many tables are kept for reuse."""
        return len(self._entries)

    def find(self, key: Key, stream: int) -> _Entry | None:
        """Returns what was stored under `key` on `stream`, if it is still there."""
        entry = self._entries.get(key)
        if entry is None or entry.stream != stream:
            return None
        self._entries.move_to_end(key)
        return entry

    def hold(self, key: Key) -> _Entry | None:
        """Returns what was stored under `key` on any stream and keeps it for good."""
        entry = self._entries.get(key)
        if entry is not None and not any(held is entry for held in self._held):
            self._held.append(entry)
        return entry

    def store(self, key: Key, stream: int, value: object) -> None:
        """Keeps `value`, and drops the least recently used one beyond the capacity."""
        self._entries[key] = _Entry(value, stream)
        self._entries.move_to_end(key)
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)


def cached(
    cache: TableCache | None,
    name: str,
    lists: Sequence[Sequence[Tensor]],
    device: torch.device,
    make: Callable[[], T],
) -> T:
    """Returns what `make` returns, or returned before for the same tensors; no host sync.

    Args:
        cache: Where to look first; None: nowhere.
        name: The launcher; launchers check their tensors differently.
        lists: The lists of tensors that `make` looks at.
        device: The device of all tensors.
        make: Checks the tensors and builds tables, on the current stream of `device`.

    Raises:
        RuntimeError: If a CUDA graph is being captured and nothing is there to be found.
    """
    key = None if cache is None else key_of(name, lists)
    return remembered(cache, key, name, "tensors that are new", device, make)


def remembered(
    cache: TableCache | None,
    key: Key | None,
    name: str,
    what: str,
    device: torch.device,
    make: Callable[[], T],
) -> T:
    """Returns what `make` returns, or returned before under `key`; no host sync.

    Args:
        cache: Where to look first; None: nowhere.
        key: Everything that the result depends on; None: not known, so nothing is found.
        name: The launcher.
        what: What is new if nothing is found, for the error.
        device: Where the result is.
        make: Makes the result, on the current stream of `device`.

    Raises:
        RuntimeError: If a CUDA graph is being captured and nothing is there to be found.
    """
    if is_capturing(device):
        entry = None if cache is None or key is None else cache.hold(key)
        if entry is None:
            raise RuntimeError(
                f"{name}: expected a table built before the capture of this CUDA graph, got "
                f"{what}. Use a Launcher, and call it with the same plain tensors "
                "at the same addresses once before the capture."
            )
        found: T = entry.value
        return found
    if cache is None or key is None:
        return make()
    stream = current_stream(device)
    entry = cache.find(key, stream)
    if entry is None:
        value = make()
        cache.store(key, stream, value)
        return value
    found = entry.value
    return found


def key_of(name: str, lists: Sequence[Sequence[Tensor]]) -> Key | None:
    """Returns all that tables and checks depend on; None for tensors that are not plain ones."""
    parts: list[object] = [name]
    for tensors in lists:
        if not PLAIN_TYPES.issuperset(map(type, tensors)):
            return None
        if not _PLAIN_LAYOUTS.issuperset(map(attrgetter("layout"), tensors)):
            return None
        # a tuple per property, not per tensor: this runs in every step, in the interpreter's C
        parts += [tuple(map(read, tensors)) for read in _PROPERTIES]
    return tuple(parts)


def is_capturing(device: torch.device) -> bool:
    """Tells whether the current stream of `device` is captured into a CUDA graph.

    Each device has a current stream of its own, and a launch goes to that of its tensors' device.
    """
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """Returns the handle of the current stream of `device`; 0 where there are no streams."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
