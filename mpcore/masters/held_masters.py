"""How an optimizer holds its masters: as float32 tensors, or packed beside the 16-bit weights.

Who steps, checks and names masters asks here where their values are, and does not know which way it
is. The wrapped optimizer knows a master by one float32 tensor in either case, its *key*: state and
gradients belong to that. The key of a packed master has values only while somebody steps over it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mpcore.backends import Backend
from mpcore.base import devices_of
from mpcore.stores import MASTER_STORES

#: Under which names an entry of the state may hold a master, in any store.
MASTER_KEYS = tuple(store.key for store in MASTER_STORES.values() if store.key is not None)

#: Parameters and their keys.
Pairs = Iterable[tuple[Tensor, Tensor]]


class HeldMasters:
    """Masters that are float32 tensors, each its own key. Nothing here syncs with the host.

    Attributes:
        store: A name in `mpcore.stores.MASTER_STORES`.
    """

    store = "float32"
    #: under which names an entry of the state may hold a master
    names: tuple[str, ...] = ("master",)

    def parts(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what an entry of the state holds of a master, by name."""
        found = ((name, state.get(name)) for name in self.names)
        return {name: value for name, value in found if value is not None}

    def without_parts(self, state: Any) -> Any:
        """Returns an entry of the state without what it holds of a master."""
        if not isinstance(state, dict):
            return state
        return {name: value for name, value in state.items() if name not in self.names}

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the dtype of the part of that name."""
        return torch.float32

    def begin(self, param: Tensor, moved: Mapping[str, Any], value: Tensor | None) -> Tensor:
        """Returns the key of a new master.

        Args:
            param: Its float16 or bfloat16 weight.
            moved: The `parts` of another parameter's master, which becomes this one if it fits.
            value: float32, becomes the master; None: what was moved, or else the weight.
        """
        if value is not None:
            return value.detach()
        master = moved.get("master")
        if master is not None and problem_with(master, torch.float32, param) is None:
            found: Tensor = master
            return found
        return param.detach().float()

    def resume(self, param: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns the key of a master that was saved as these `parts`, which are not copied."""
        return parts["master"]

    def shared(self, param: Tensor, key: Tensor) -> Any:
        """Returns what another optimizer needs to `share` a master; it is weakly referenced."""
        return key

    def share(self, param: Tensor, held: Any) -> Tensor:
        """Returns the key of a master that another optimizer has `shared`."""
        key: Tensor = held
        return key

    def value_of_shared(self, param: Tensor, held: Any) -> Tensor:
        """Returns the float32 values of a master that another optimizer has `shared`."""
        return self.share(param, held)

    def overwrite(self, param: Tensor, key: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Makes a master what was saved as these `parts`, in place: others hold it too."""
        key.copy_(parts["master"])

    def value_in(self, param: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns the float32 values of a master that was saved as these `parts`."""
        return parts["master"]

    def is_whole(self, param: Tensor) -> bool:
        """Whether a master is a float32 tensor now, which the weight beside it has to fit."""
        return True

    def shown(self, param: Tensor, key: Tensor) -> dict[str, Tensor]:
        """Returns what `optimizer.state[param]` shows of a master: its tensor, as it lies."""
        return {"master": key}

    def take(self, param: Tensor, key: Tensor, state: dict[str, Any]) -> Tensor:
        """Takes what somebody put in the place of `shown` out of a state; returns the key."""
        new: Tensor = state.pop("master", key)
        return new

    def check_shown(self, shown: Mapping[Any, Any], pairs: Pairs) -> None:
        """Raises `ArgumentError` if `take` cannot take what is shown; nothing has changed then."""

    def value_of(self, param: Tensor, key: Tensor) -> Tensor:
        """Returns a master in float32: itself, or what it stands for, in memory of its own."""
        return key

    def layout_of(self, param: Tensor, key: Tensor) -> Tensor:
        """Returns a tensor that has the strides of a master while it is stepped; of any dtype."""
        return key

    def lies_in(self, param: Tensor, key: Tensor) -> Tensor:
        """Returns the tensor that holds what the weight does not."""
        return key

    def store_of(self, param: Tensor) -> str:
        """Returns the store of one master as it is now: "float32" while it is whole."""
        return "float32" if self.is_whole(param) else self.store

    def pack(self, pairs: Pairs, saturated: Tensor) -> bool:
        """Encodes whole masters that need not be, weights too; returns whether there were any."""
        return False

    def decode(self, pairs: Pairs) -> None:
        """Gives keys the values of their masters, until `release`."""

    def release(self, pairs: Pairs) -> None:
        """Takes the values that `decode` gave out of memory."""

    def write(self, pairs: Pairs, backend: Backend, found_inf: Tensor, saturated: Tensor) -> None:
        """Writes the values of keys into weights, and what weights do not hold to where it lies.

        Args:
            pairs: Whose keys have values.
            backend: Rounds.
            found_inf: 0-d int32: not 0 means that nothing is written.
            saturated: 0-d int64: the number of clamped weights is added to it.
        """
        pairs = list(pairs)
        for device in devices_of(param for param, _ in pairs):
            here = [pair for pair in pairs if pair[0].device == device]
            count = torch.zeros_like(saturated, device=device)
            found = found_inf.to(device, non_blocking=True)
            self._write_on(here, backend, found, count)
            saturated.add_(count.to(saturated.device, non_blocking=True))

    def _write_on(
        self, pairs: list[tuple[Tensor, Tensor]], backend: Backend, found: Tensor, count: Tensor
    ) -> None:
        keys, weights = [key for _, key in pairs], [param for param, _ in pairs]
        backend.cast_into(keys, weights, found, count)

    def forget(self, param: Tensor) -> None:
        """Forgets the master of a parameter."""

    def clear(self) -> None:
        """Forgets all."""


def problem_with(value: Any, dtype: torch.dtype, param: Tensor) -> str | None:
    """Returns why a value is no tensor of a dtype and a parameter's shape; None: it is one."""
    if isinstance(value, Tensor) and (value.dtype, value.shape) == (dtype, param.shape):
        return None
    got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return f"expected a {dtype} tensor of shape {list(param.shape)}, got {got}"
