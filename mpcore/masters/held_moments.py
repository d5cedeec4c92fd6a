"""How an optimizer holds its moments: as float32 tensors, or compact ones in their place.

    state["exp_avg"]           as it lies: float32, bfloat16, or codes of 8 bits
    state["exp_avg_scales"]    float32, the scales of codes
    state["random_key"]        an integer, where anything of the parameter is rounded at random

What came in float32, from a checkpoint or from a user, stays so until a step is planned. Only fused
updates read compact moments: there is no general path for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mpcore.base import held_here, sharded_like
from mpcore.errors import ArgumentError
from mpcore.masters.scales import cover_rows, new_scales
from mpcore.stores import MASTER_STORES, MOMENT_STORES, MomentStore, key_of, moment_store
from mpcore.updates import Batch, UpdateRule

#: What `moments=` may be.
MOMENTS = ("float32", "bfloat16", "int8")
#: Under which name a state holds the key of its random bits.
RANDOM_KEY = "random_key"

State = dict[str, Any]


def scales_of(name: str) -> str:
    """Returns under which name a state holds the scales of a moment."""
    return f"{name}_scales"


@dataclass(frozen=True)
class HeldMoments:
    """How moments are kept. Nothing here syncs with the host.

    Attributes:
        kept: One of `MOMENTS`.
        seed: Of the random bits of parameters that have no key yet.
    """

    kept: str
    seed: int

    @property
    def are_compact(self) -> bool:
        """Whether they are other than float32 tensors."""
        return self.kept != "float32"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What a moment may lie in, besides float32."""
        return {"float32": (), "bfloat16": (torch.bfloat16,)}.get(
            self.kept, (torch.bfloat16, *_CODES)
        )

    def stores(self, like: Tensor, names: Sequence[str], rule: UpdateRule) -> tuple[str, ...]:
        """Returns how each moment of a parameter is kept.

        Args:
            like: Has its shape, strides and placements.
            names: Of the moments.
            rule: Whose.
        """
        wanted, here = self.kept, held_here(like.detach())
        if wanted == "int8" and not cover_rows(like):
            wanted = "bfloat16"
        return tuple(
            moment_store(
                wanted, here.shape, here.stride(), negative=name not in rule.never_negative
            ).name
            for name in names
        )

    def are_random(self, master: str, kept: Sequence[str]) -> bool:
        """Whether an update rounds anything at random.

        Args:
            master: The store of masters.
            kept: Those of moments.
        """
        return MASTER_STORES[master].is_random or any(MOMENT_STORES[m].is_random for m in kept)

    def told(
        self,
        batch: Batch,
        states: Iterable[tuple[State, int]],
        names: Sequence[str],
        kept: Sequence[str],
    ) -> Batch:
        """Returns a batch that says how its moments are kept, and which random bits it draws.

        Args:
            batch: Without that.
            states: Of its tensors, and the place of each in the param groups; a state that has no
                key gets one if the batch is random.
            names: Of its moments.
            kept: The stores of these.
        """
        if not self.are_random(batch.store, kept):  # nor anything else than float32
            return batch
        pairs = list(states)
        scales = [
            [state[scales_of(n)] for state, _ in pairs] if MOMENT_STORES[store].has_scales else None
            for n, store in zip(names, kept, strict=True)
        ]
        return replace(
            batch,
            moment_stores=tuple(kept),
            scales=scales,
            keys=[state.setdefault(RANDOM_KEY, key_of(self.seed, n)) for state, n in pairs],
            offsets=list(map(first_offset, batch.masters)),
        )

    def names_in(self, names: Sequence[str], kept: Sequence[str]) -> tuple[str, ...]:
        """Returns the names of all tensors that hold moments of these names and stores."""
        pairs = zip(names, kept, strict=True)
        return (*names, *(scales_of(n) for n, store in pairs if MOMENT_STORES[store].has_scales))

    def decoded(self, state: Mapping[str, Any]) -> State:
        """Returns a state in float32, without what only compact moments need."""
        if not self.are_compact:
            return {name: value for name, value in state.items() if name != RANDOM_KEY}
        others = {RANDOM_KEY, *map(scales_of, state)}
        return {
            name: _in_float32(value, state.get(scales_of(name))) if _is_compact(value) else value
            for name, value in state.items()
            if name not in others
        }

    def write(self, state: State, name: str, value: Tensor) -> None:
        """Writes a moment in place, rounded to nearest.

        Args:
            state: That has it.
            name: Of the moment.
            value: Floating, its shape.
        """
        held, scales = state[name], state.get(scales_of(name))
        if not (self.are_compact and _is_compact(held)):
            held.copy_(value)
            return
        here = held_here(sharded_like(held, value.detach().to(held.device)))
        codes, new = _store_of(held).encode(_laid_out(here, held_here(held)))
        held_here(held).copy_(codes)
        if new is not None and scales is not None:
            held_here(scales).copy_(new)


def check_moments(kept: str, seed: int) -> HeldMoments:
    """Returns how moments are held; raises `ArgumentError` unless both are allowed."""
    if kept not in MOMENTS:
        raise ArgumentError(f"moments: expected one of {', '.join(MOMENTS)}, got {kept!r}.")
    if type(seed) is not int:
        raise ArgumentError(f"seed: expected an integer, got {seed!r}.")
    return HeldMoments(kept, seed)


def complete(state: State, name: str, like: Tensor, first: float, store: str) -> None:
    """Makes a moment of a state what kernels want, rounded to nearest if it lies otherwise.

    Args:
        state: Of a parameter; it may have the moment, in any store.
        name: Of the moment.
        like: Has the parameter's shape, strides and placements.
        first: What a moment that is not there starts from.
        store: How it is to be kept.

    Raises:
        ArgumentError: What is there has another shape.
    """
    moment, scales, to = state.get(name), state.get(scales_of(name)), MOMENT_STORES[store]
    if moment is None:
        _begin(state, name, like, first, to)
        return
    if moment.shape != like.shape:
        raise ArgumentError(
            f"state[{name!r}]: expected {list(like.shape)} like the parameter, got "
            f"{list(moment.shape)}. Put a tensor of its shape there, or delete the entry of "
            "the parameter from optimizer.state to begin anew."
        )
    if scales is None and moment.dtype in _CODES:
        raise ArgumentError(
            f"state[{name!r}]: expected {scales_of(name)!r} beside codes of {moment.dtype}, got "
            "none. Write values with optimizer.set_float32_state()."
        )
    here = held_here(like)
    if moment.dtype == to.dtype and held_here(moment).stride() == here.stride():
        state[name] = sharded_like(like, moment)
        return
    if scales is not None:
        moment = _in_float32(moment, scales)
        del state[scales_of(name)]
    if to.name == "float32":
        state[name] = torch.empty_like(like, dtype=torch.float32).copy_(sharded_like(like, moment))
        return
    _encode(state, name, like, held_here(sharded_like(like, moment)).float(), to)


def _begin(state: State, name: str, like: Tensor, first: float, to: MomentStore) -> None:
    if first == 0 or to.name == "float32":
        state[name] = torch.full_like(like, first, dtype=to.dtype)
        if to.has_scales:
            state[scales_of(name)] = new_scales(like)
        return
    _encode(state, name, like, torch.full_like(held_here(like), first, dtype=torch.float32), to)


def _encode(state: State, name: str, like: Tensor, value: Tensor, to: MomentStore) -> None:
    """Puts what this rank holds of a moment into a state, in a store."""
    codes, scales = to.encode(_laid_out(value, held_here(like)))
    state[name] = torch.empty_like(like, dtype=to.dtype)
    held_here(state[name]).copy_(codes)
    if scales is not None:
        state[scales_of(name)] = new_scales(like)
        held_here(state[scales_of(name)]).copy_(scales)


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """Returns float32 values with the strides of a tensor: blocks go by memory."""
    if value.dtype == torch.float32 and value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=torch.float32).copy_(value)


_CODES = tuple(store.dtype for store in MOMENT_STORES.values() if store.has_scales)
_OF_DTYPE = {store.dtype: store for store in MOMENT_STORES.values()}


def _is_compact(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.dtype == torch.bfloat16 or value.dtype in _CODES)


def _store_of(held: Tensor) -> MomentStore:
    return _OF_DTYPE[held.dtype]


def _in_float32(held: Tensor, scales: Tensor | None) -> Tensor:
    """Returns the values of a moment in memory of their own, as a DTensor if it is one."""
    value = torch.empty_like(held, dtype=torch.float32)
    beside = None if scales is None else held_here(scales)
    held_here(value).copy_(_store_of(held).decode(held_here(held), beside))
    return value


def first_offset(tensor: Any) -> int:
    """Returns where what this rank holds begins in the full tensor, in elements.

    Example:
        >>> first_offset(torch.zeros(3))
        0
    """
    if not hasattr(tensor, "placements"):
        return 0
    # here, since not every build of torch has them
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, starts = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    shape = tensor.shape
    return sum(start * math.prod(shape[dim + 1 :]) for dim, start in enumerate(starts))
