"""Packed masters: the 16-bit weight is one part of its master, another one lies beside it.

    split: an int16 remainder      14 bytes a parameter with AdamW: weight 2, gradient 2,
                                   remainder 2, moments 8
    none: nothing                  12 bytes: the weight, rounded at random, is all there is

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
        beside: What lies beside the weight, likewise, if anything does.
        is_whole: Whether its values are those of `key`.
    """

    def __init__(
        self, store: MasterStore, key: Tensor, beside: Tensor | None, *, is_whole: bool
    ) -> None:
        self.store = store
        self.key = key
        self.beside = beside
        self.is_whole = is_whole
        self.release()

    def value(self, param: Tensor) -> Tensor:
        """Returns it in float32."""
        if self.is_whole:
            return self.key
        here = self._decoded(param)
        if held_here(self.key) is self.key:
            return here
        value = torch.empty_like(param.detach(), dtype=torch.float32)  # a DTensor
        held_here(value).copy_(here)
        return value

    def _decoded(self, param: Tensor) -> Tensor:
        beside = None if self.beside is None else held_here(self.beside)
        return self.store.decode(held_here(param.detach()), beside)

    def decode(self, param: Tensor) -> None:
        """Gives the key its values."""
        if not self.is_whole:
            held_here(self.key).data = self._decoded(param)

    def release(self) -> None:
        """Takes the values of the key out of memory: who reads it nevertheless finds NaN."""
        if not self.is_whole:
            here = held_here(self.key)
            nothing = torch.full((), torch.nan, dtype=torch.float32, device=here.device)
            here.data = nothing.expand(here.shape)

    def encode(self, param: Tensor, found_inf: Tensor, saturated: Tensor) -> None:
        """Writes the values of the key to the weight and beside it unless `found_inf` is set."""
        weight = held_here(param.detach())
        if self.is_whole:
            self.is_whole = False
            if self.store.dtype is not None:
                self.beside = torch.zeros_like(param.detach(), dtype=self.store.dtype)
            found_inf = torch.zeros_like(found_inf)  # they wait for it, skipped or not
        keep = found_inf != 0
        new = self.store.encode(held_here(self.key.detach()), weight.dtype)
        torch.where(keep, weight, new.weight, out=weight)
        if new.beside is not None and self.beside is not None:
            beside = held_here(self.beside)
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
        #: what lies beside a weight: its name, its dtype; None: nothing does
        self._beside, self._dtype = self._codec.key, self._codec.dtype
        self.names = ("master",) if self._beside is None else (self._beside, "master")
        self._of: dict[Tensor, PackedMaster] = {}

    def dtype_of(self, name: str) -> torch.dtype:
        """See `HeldMasters.dtype_of`."""
        return self._dtype if name == self._beside and self._dtype else torch.float32

    def begin(self, param: Tensor, moved: Mapping[str, Any], value: Tensor | None) -> Tensor:
        """See `HeldMasters.begin`; beside a weight that is all there is lie zeros."""
        if param.dtype not in self._codec.weight_dtypes:
            raise ArgumentError(_why_not_dtype(self.store, param))
        if value is not None:
            return self._hold(param, value.detach(), None, is_whole=True)
        for name, part in moved.items():
            if problem_with(part, self.dtype_of(name), param) is None:
                return self.resume(param, {name: part})
        beside = None
        if self._dtype is not None:
            beside = torch.zeros_like(param.detach(), dtype=self._dtype)
        return self._begin(param, beside)

    def resume(self, param: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """See `HeldMasters.resume`."""
        if "master" in parts:
            return self._hold(param, parts["master"], None, is_whole=True)
        return self._begin(param, self._part_beside(parts))

    def _part_beside(self, parts: Mapping[str, Tensor]) -> Tensor | None:
        return None if self._beside is None else parts.get(self._beside)

    def _begin(self, param: Tensor, beside: Tensor | None) -> Tensor:
        key = torch.empty_like(param.detach(), dtype=torch.float32)
        return self._hold(param, key, beside, is_whole=False)

    def _hold(self, param: Tensor, key: Tensor, beside: Tensor | None, *, is_whole: bool) -> Tensor:
        self._of[param] = PackedMaster(self._codec, key, beside, is_whole=is_whole)
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
        held, master = self._of[param], parts.get("master")
        held.beside, held.is_whole = self._part_beside(parts), master is not None
        if master is not None:
            held_here(key).data = held_here(master.detach())
        held.release()  # what a whole one held

    def value_in(self, param: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """See `HeldMasters.value_in`."""
        if "master" in parts:
            return parts["master"]
        key = torch.empty_like(param.detach(), dtype=torch.float32)
        beside = self._part_beside(parts)
        return PackedMaster(self._codec, key, beside, is_whole=False).value(param)

    def is_whole(self, param: Tensor) -> bool:
        """See `HeldMasters.is_whole`."""
        return self._of[param].is_whole

    def shown(self, param: Tensor, key: Tensor) -> dict[str, Tensor]:
        """See `HeldMasters.shown`: "remainder", or "master" while it is whole."""
        held = self._of[param]
        if held.is_whole:
            return {"master": key}
        return {} if self._beside is None or held.beside is None else {self._beside: held.beside}

    def take(self, param: Tensor, key: Tensor, state: dict[str, Any]) -> Tensor:
        """See `HeldMasters.take`; a remainder that was taken out stays."""
        beside: Tensor | None = state.pop(self._beside, None) if self._beside else None
        master: Tensor = state.pop("master", key)
        if master is not key:
            return self._hold(param, master, None, is_whole=True)
        if beside is not None:
            held = self._of[param]
            held.beside, held.is_whole = beside, False
            held.release()
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
        held = self._of[param]
        if held.is_whole:
            return key
        return param if held.beside is None else held.beside

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
STORES = ("float32", "split", "none")


def hold_masters(store: str) -> HeldMasters:
    """Returns what holds masters in one of `STORES`."""
    return HeldMasters() if store == "float32" else PackedMasters(store)


def _why_not_dtype(store: str, param: Tensor) -> str:
    names = ", ".join(str(dtype) for dtype in MASTER_STORES[store].weight_dtypes)
    return (
        f"masters: expected weights of {names} with {store!r}, got one of shape "
        f"{list(param.shape)} in {param.dtype}, whose small numbers are too far apart to be "
        'trained without masters. Pass masters="split".'
    )


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
        if param.dtype in SIXTEEN_BIT and param.dtype not in MASTER_STORES[store].weight_dtypes:
            raise ArgumentError(_why_not_dtype(store, param))
        reason = why_no_memory(held_here(param.detach()))
        # the reference backend computes with torch's operations, which wrappers know
        if param.dtype in SIXTEEN_BIT and reason is not None and backend != "reference":
            raise ArgumentError(
                f"masters: expected {store!r} for weights that lie in memory, got one of shape "
                f'{list(param.shape)}: {reason}. Pass masters="float32".'
            )
