"""Packed masters: the 16-bit weight is one part of its master, another one lies beside it.

    split: an int16 remainder      14 bytes a parameter with AdamW: weight 2, gradient 2,
                                   remainder 2, moments 8

A master is *whole* from when it came in float32, from a checkpoint or from `cast_model`, to the
next step: till then its weight may be loaded, broadcast or edited as beside any float32 master.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mpcore.backends import Backend
from mpcore.base import SIXTEEN_BIT, held_here, why_no_memory
from mpcore.errors import ArgumentError
from mpcore.masters.held_masters import HeldMasters, Pairs, problem_with
from mpcore.stores import MASTER_STORES, MasterStore


class PackedMaster:
    """One master; several optimizers may hold it.

    Args:
        store: Encodes and decodes.
        key: float32, with the weight's shape.
        beside: What lies beside the weight, likewise; None: the master is whole, its values are
            those of `key`.
    """

    def __init__(self, store: MasterStore, key: Tensor, beside: Tensor | None) -> None:
        self.store = store
        self.key = key
        self.beside = beside
        if beside is not None:
            self.release()

    def value(self, param: Tensor) -> Tensor:
        """Returns it in float32."""
        if self.beside is None:
            return self.key
        here = self.store.decode(held_here(param.detach()), held_here(self.beside))
        if type(self.beside) is Tensor:
            return here
        value = torch.empty_like(self.beside, dtype=torch.float32)  # a DTensor
        held_here(value).copy_(here)
        return value

    def decode(self, param: Tensor) -> None:
        """Gives the key its values."""
        if self.beside is not None:
            weight, beside = held_here(param.detach()), held_here(self.beside)
            held_here(self.key).data = self.store.decode(weight, beside)

    def release(self) -> None:
        """Takes the values of the key out of memory: who reads it nevertheless finds NaN."""
        if self.beside is not None:
            here = held_here(self.key)
            nothing = torch.full((), torch.nan, dtype=torch.float32, device=here.device)
            here.data = nothing.expand(here.shape)

    def encode(self, param: Tensor, found_inf: Tensor, saturated: Tensor) -> None:
        """Writes the values of the key to the weight and beside it unless `found_inf` is set."""
        weight = held_here(param.detach())
        if self.beside is None:
            self.beside = torch.zeros_like(param.detach(), dtype=self.store.dtype)
            found_inf = torch.zeros_like(found_inf)  # they wait for it, skipped or not
        beside, keep = held_here(self.beside), found_inf != 0
        new = self.store.encode(held_here(self.key.detach()), weight.dtype)
        torch.where(keep, weight, new.weight, out=weight)
        if new.beside is not None:
            torch.where(keep, beside, new.beside, out=beside)
        saturated.add_((new.clamped & keep.logical_not()).sum())


class PackedMasters(HeldMasters):
    """Masters of which the weights are a part. Nothing here syncs with the host.

    Args:
        store: A name in `mpcore.stores.MASTER_STORES`.
    """

    def __init__(self, store: str) -> None:
        self.store = store
        self._codec = MASTER_STORES[store]
        self._beside, self._dtype = str(self._codec.key), self._codec.dtype or torch.float32
        self.names = (self._beside, "master")
        self._of: dict[Tensor, PackedMaster] = {}

    def dtype_of(self, name: str) -> torch.dtype:
        """See `HeldMasters.dtype_of`."""
        return torch.float32 if name == "master" else self._dtype

    def begin(self, param: Tensor, moved: Mapping[str, Any], value: Tensor | None) -> Tensor:
        """See `HeldMasters.begin`; beside a weight that is all there is lie zeros."""
        if value is not None:
            return self._hold(param, value.detach(), None)
        for name, part in moved.items():
            if problem_with(part, self.dtype_of(name), param) is None:
                return self.resume(param, {name: part})
        return self.resume(
            param, {self._beside: torch.zeros_like(param.detach(), dtype=self._dtype)}
        )

    def resume(self, param: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """See `HeldMasters.resume`."""
        beside = parts.get(self._beside)
        if beside is None:
            return self._hold(param, parts["master"], None)
        return self._hold(param, torch.empty_like(param.detach(), dtype=torch.float32), beside)

    def _hold(self, param: Tensor, key: Tensor, beside: Tensor | None) -> Tensor:
        self._of[param] = PackedMaster(self._codec, key, beside)
        return key

    def shared(self, param: Tensor, key: Tensor) -> Any:
        """See `HeldMasters.shared`."""
        return self._of[param]

    def share(self, param: Tensor, held: Any) -> Tensor:
        """See `HeldMasters.share`."""
        self._of[param] = held
        key: Tensor = held.key
        return key

    def value_of_shared(self, param: Tensor, held: Any) -> Tensor:
        """See `HeldMasters.value_of_shared`."""
        value: Tensor = held.value(param)
        return value

    def overwrite(self, param: Tensor, key: Tensor, parts: Mapping[str, Tensor]) -> None:
        """See `HeldMasters.overwrite`."""
        beside = self._of[param].beside = parts.get(self._beside)
        if beside is None:
            held_here(key).data = held_here(parts["master"].detach())
        self._of[param].release()  # what a whole one held

    def value_in(self, param: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """See `HeldMasters.value_in`."""
        key = torch.empty_like(param.detach(), dtype=torch.float32)
        beside = parts.get(self._beside)
        if beside is None:
            return parts["master"]
        return PackedMaster(self._codec, key, beside).value(param)

    def is_whole(self, param: Tensor) -> bool:
        """See `HeldMasters.is_whole`."""
        return self._of[param].beside is None

    def shown(self, param: Tensor, key: Tensor) -> dict[str, Tensor]:
        """See `HeldMasters.shown`: "remainder", or "master" while it is whole."""
        beside = self._of[param].beside
        return {"master": key} if beside is None else {self._beside: beside}

    def take(self, param: Tensor, key: Tensor, state: dict[str, Any]) -> Tensor:
        """See `HeldMasters.take`; a remainder that was taken out stays."""
        beside: Tensor | None = state.pop(self._beside, None)
        master: Tensor = state.pop("master", key)
        if master is not key:
            return self._hold(param, master, None)
        if beside is not None:
            self._of[param].beside = beside
            self._of[param].release()
        return key

    def check_shown(self, shown: Mapping[Any, Any], pairs: Pairs) -> None:
        """See `HeldMasters.check_shown`."""
        for param, _ in pairs:
            state = shown.get(param)
            for name, part in self.parts(state if isinstance(state, dict) else {}).items():
                problem = problem_with(part, self.dtype_of(name), param)
                if problem is not None:
                    raise ArgumentError(
                        f"optimizer.state[...][{name!r}]: {problem}. Put back what was there, or "
                        "write values with optimizer.set_float32_state()."
                    )

    def value_of(self, param: Tensor, key: Tensor) -> Tensor:
        """See `HeldMasters.value_of`."""
        return self._of[param].value(param)

    def layout_of(self, param: Tensor, key: Tensor) -> Tensor:
        """See `HeldMasters.layout_of`."""
        return key if self.is_whole(param) else param.detach()

    def lies_in(self, param: Tensor, key: Tensor) -> Tensor:
        """See `HeldMasters.lies_in`."""
        beside = self._of[param].beside
        return key if beside is None else beside

    def pack(self, pairs: Pairs, saturated: Tensor) -> bool:
        """See `HeldMasters.pack`; no earlier than a step, which has seen what the weights are."""
        whole = [(param, self._of[param]) for param, _ in pairs if self.is_whole(param)]
        for param, master in whole:
            zero = torch.zeros((), dtype=torch.int64, device=param.device)
            count = zero.clone()
            master.encode(param, zero, count)
            master.release()
            saturated.add_(count.to(saturated.device, non_blocking=True))
        return bool(whole)

    def decode(self, pairs: Pairs) -> None:
        """See `HeldMasters.decode`: 4 bytes a parameter."""
        for param, _ in pairs:
            self._of[param].decode(param)

    def release(self, pairs: Pairs) -> None:
        """See `HeldMasters.release`."""
        for param, _ in pairs:
            self._of[param].release()

    def _write_on(
        self, pairs: list[tuple[Tensor, Tensor]], backend: Backend, found: Tensor, count: Tensor
    ) -> None:
        for param, _ in pairs:
            self._of[param].encode(param, found, count)

    def forget(self, param: Tensor) -> None:
        """See `HeldMasters.forget`."""
        self._of.pop(param, None)

    def clear(self) -> None:
        """See `HeldMasters.clear`."""
        self._of.clear()


#: What `masters=` may be.
STORES = ("float32", "split")


def hold_masters(store: str) -> HeldMasters:
    """Returns what holds masters in one of `STORES`."""
    return HeldMasters() if store == "float32" else PackedMasters(store)


def check_store(store: str, backend: str, on_weight_edit: str, params: Iterable[Tensor]) -> None:
    """Raises `ArgumentError` unless masters can be kept in a store.

    Args:
        store: Its name.
        backend: That of the backend that will update them.
        on_weight_edit: What the user wants of weights that others write to.
        params: Of the optimizer.
    """
    if store not in STORES:
        raise ArgumentError(f"masters: expected one of {', '.join(STORES)}, got {store!r}.")
    if store == "float32":
        return
    if backend == "cpu":
        raise ArgumentError(
            f'masters: expected "float32" with the backend "cpu", whose kernels are torch\'s and '
            f'know float32 tensors alone, got {store!r}. Pass backend="reference", with '
            'path="fused" or the general path; or backend="compiled", with a wheel of this '
            "platform or a C compiler."
        )
    if on_weight_edit == "raise":
        raise ArgumentError(
            f'on_weight_edit: expected "adopt" or "always" with masters={store!r}, got "raise". A '
            "weight is a part of its master, so that there is nothing to compare it with. Pass "
            'masters="float32" to find out where weights are written to.'
        )
    for param in params:
        reason = why_no_memory(held_here(param.detach()))
        # the reference backend computes with torch's operations, which wrappers know
        if param.dtype in SIXTEEN_BIT and reason is not None and backend != "reference":
            raise ArgumentError(
                f"masters: expected {store!r} for weights that lie in memory, got one of shape "
                f'{list(param.shape)}: {reason}. Pass masters="float32".'
            )
