"""Which tensors a fused step updates, in which batches, with which hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpcore.backends import Backend
from mpcore.base import SIXTEEN_BIT, ParameterSet, addresses_of, are_same, held_here
from mpcore.masters.held_moments import complete
from mpcore.masters.held_state import HeldState
from mpcore.masters.masters import Groups, Masters
from mpcore.updates import Batch, Hyper, UpdateRule, shared_base

#: What the tensors of a batch have in common: names of moments, 16-bit dtype, store of masters,
#: and those of moments.
_Key = tuple[tuple[str, ...], torch.dtype | None, str, tuple[str, ...]]


@dataclass
class DevicePlan:
    """The batches of one device.

    Attributes:
        device: Where all of it is.
        params: The parameters of each batch, in the order of its masters.
        plan: What the backend made of the batches.
        rule: What computes the update.
        groups: The optimizer's param groups.
    """

    device: torch.device
    params: list[list[Tensor]]
    plan: Any
    rule: UpdateRule
    groups: Groups
    # for what it is prepared, and that itself: an id says nothing once its tensor is gone
    _prepared: tuple[Any, Hyper] | None = field(default=None, init=False)

    def read_hyper(self) -> Hyper:
        """Returns the hyper-parameters as they are now; no host sync."""
        rates = [_learning_rate(group["lr"], self.device) for group in self.groups]
        numbers = tuple(
            self.rule.numbers(group, rate if isinstance(rate, float) else 0.0)
            for group, rate in zip(self.groups, rates, strict=True)
        )
        return Hyper(numbers, tuple(rate if isinstance(rate, Tensor) else None for rate in rates))

    def note_prepared(self, hyper: Hyper) -> None:
        """Notes what the backend's plan has been prepared for."""
        self._prepared = (_identity(hyper), hyper)

    def prepare(self, backend: Backend) -> None:
        """Prepares the plan unless it is, for the hyper-parameters of now."""
        hyper = self.read_hyper()
        if self._prepared is None or self._prepared[0] != _identity(hyper):
            backend.prepare_(self.plan, hyper)
            self.note_prepared(hyper)

    def used(self) -> None:
        """Notes that an update took what was prepared, or that something else is going to be."""
        self._prepared = None


@dataclass(frozen=True)
class StepPlan:
    """The batches of all devices, for one set of parameters that have a gradient.

    Attributes:
        devices: A plan for each.
        written: The parameters.
        members: All parameters of each param group.
        moments: The names of each group's moments.
        version: That of the masters.
        held: What the state consisted of when the plan was made.
    """

    devices: tuple[DevicePlan, ...]
    written: ParameterSet
    members: tuple[list[Tensor], ...]
    moments: list[tuple[str, ...]]
    version: int
    held: HeldState

    def fits(
        self, params: Sequence[Tensor], groups: Groups, rule: UpdateRule, masters: Masters
    ) -> bool:
        """Whether this is what `make_plan` would return; no host sync."""
        return (
            self.version == masters.version
            and self.is_of(params)
            and addresses_of(params, sharded=self.written.any_dtensor) == self.written.addresses
            and len(groups) == len(self.members)
            and all(are_same(g["params"], m) for g, m in zip(groups, self.members, strict=True))
            and [rule.moments(group) for group in groups] == self.moments
            and self.held.is_current
        )

    def is_of(self, params: Sequence[Tensor]) -> bool:
        """Whether this updates these parameters and no others."""
        return params is self.written or are_same(params, self.written)

    def on(self, device: torch.device) -> DevicePlan | None:
        """Returns the part of one device; None: nothing is there, or groups came or went since."""
        part = next((part for part in self.devices if part.device == device), None)
        return part if part is not None and len(part.groups) == len(self.members) else None


def make_plan(
    params: Sequence[Tensor],
    groups: Groups,
    inner_state: dict[Tensor, dict[str, Any]],
    masters: Masters,
    rule: UpdateRule,
    backend: Backend,
) -> StepPlan:
    """Sorts parameters into batches and makes what is missing of their state; no host sync.

    Args:
        params: Those that have a gradient; 16-bit ones have a master.
        groups: The optimizer's param groups.
        inner_state: The wrapped optimizer's state, by master.
        masters: Where the masters are.
        rule: What computes the update.
        backend: Does it.
    """
    group_of = {param: i for i, group in enumerate(groups) for param in group["params"]}
    names_of = [rule.moments(group) for group in groups]
    number_of = masters.numbers()
    sorted_params = _sorted(params, lambda param: names_of[group_of[param]], masters, rule)
    devices = []
    everything = HeldState(inner_state)
    for device, by_key in sorted_params.items():
        batches = []
        for (names, half, store, kept), members in by_key.items():
            held = [masters.of(param) for param in members]
            lying = held if half is None else _laid_out(masters, members)
            like = map(masters.layout_of, members)
            values = [rule.first_moments(groups[group_of[param]]) for param in members]
            first = [list(zip(names, one, kept, strict=True)) for one in values]
            counts = masters.moments.are_random(store, kept) or rule.counts_steps(names)
            those = zip(held, like, first, strict=True)
            states = [_complete(inner_state, of, one, counts) for *of, one in those]
            if counts:
                _gather_steps(states)
            everything.add(lying, states, masters.moments.names_in(names, kept))
            batch = Batch(
                masters=lying,
                store=store,
                weights=None if half is None or store == "none" else members,
                moments=[[state[name] for state in states] for name in names],
                steps=[state["step"] for state in states] if counts else None,
                groups=[group_of[param] for param in members],
            )
            numbered = zip(states, map(number_of.__getitem__, members), strict=True)
            batches.append(masters.moments.told(batch, numbered, names, kept))
        plan = backend.plan_update(rule.name, batches)
        devices.append(DevicePlan(device, list(by_key.values()), plan, rule, groups))
    masters.link_state(params)
    return StepPlan(
        devices=tuple(devices),
        written=ParameterSet.as_now(params),
        members=tuple(list(group["params"]) for group in groups),
        moments=names_of,
        version=masters.version,
        held=everything,
    )


def _sorted(
    params: Sequence[Tensor],
    names: Callable[[Tensor], tuple[str, ...]],
    masters: Masters,
    rule: UpdateRule,
) -> dict[torch.device, dict[_Key, list[Tensor]]]:
    """Returns parameters by device, then by what a batch has one of."""
    by_device: dict[torch.device, Any] = {}
    for param in params:
        half = param.dtype if param.dtype in SIXTEEN_BIT else None
        store = "float32" if half is None else masters.held.store_of(param)
        by_key = by_device.setdefault(param.device, {})
        kept = masters.moments.stores(masters.layout_of(param), names(param), rule)
        by_key.setdefault((names(param), half, store, kept), []).append(param)
    return by_device


def _laid_out(masters: Masters, params: Sequence[Tensor]) -> list[Tensor]:
    """Returns what masters lie in, with the strides of their weights: kernels count on it.

    These may have changed: a state that was loaded has those of where it was saved, and
    `model.to(memory_format=...)` leaves masters behind.
    """
    lying = [masters.held.lies_in(param, masters.of(param)) for param in params]
    for weight, tensor in zip(params, lying, strict=True):
        here, held = held_here(weight.detach()), held_here(tensor)
        if held.stride() != here.stride():
            held.data = torch.empty_like(here, dtype=held.dtype).copy_(held)
    return lying


def _complete(
    inner_state: dict[Tensor, dict[str, Any]],
    of: Sequence[Tensor],
    first: Sequence[tuple[str, float, str]],
    counts: bool,
) -> dict[str, Any]:
    """Returns the state of a master with every moment and the step count in it, as kernels want.

    Args:
        inner_state: The wrapped optimizer's state, by master.
        of: A master, and a tensor that has its shape and strides.
        first: The names of its moments, what they start from, and their stores.
        counts: Whether steps are counted.
    """
    master, like = of
    state = inner_state[master] if first or counts else {}
    had_moments = bool(first) and state.get(first[0][0]) is not None
    for name, value, store in first:
        complete(state, name, like, value, store)
    if counts:
        step = state.get("step")
        # torch.optim.SGD counts nothing: a velocity that exists has had its first step
        value = float(had_moments) if step is None else step
        if not isinstance(value, Tensor):
            state["step"] = torch.full((), value, dtype=torch.float32, device=master.device)
        elif value.device != master.device or value.dtype != torch.float32:
            state["step"] = value.to(master.device, torch.float32, non_blocking=True)
    return state


def _gather_steps(states: list[dict[str, Any]]) -> None:
    """Makes the step counts views of one tensor, so that one operation counts them all."""
    steps = [state["step"] for state in states]
    if len(steps) > 1 and shared_base(steps) is None:
        together = torch.stack([step.reshape(()) for step in steps]).detach()
        for state, step in zip(states, together.unbind(), strict=True):
            state["step"] = step


def _learning_rate(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """Returns a learning rate that the host knows as a number, another one as its tensor."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return lr.to(device, non_blocking=True)
    return float(lr)


def _identity(hyper: Hyper) -> tuple[Any, ...]:
    """Returns what is equal exactly if two are: tensors by object and number of writes."""
    return (hyper.numbers, *((id(lr), lr._version) for lr in hyper.lrs if lr is not None))
