"""Checkpoints of an optimizer, and its state in float32 however that lies in memory."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpcore.backends import Backend
from mpcore.base import SIXTEEN_BIT, map_tensors, outside_graphs
from mpcore.checkpoint import (
    SECTION,
    new_section,
    read_section,
    read_states,
    read_sums,
    section_in,
    sums_section,
)
from mpcore.engine.stage import Stage
from mpcore.errors import ArgumentError, StageError
from mpcore.loss_scale import Losses, LossScale, LossScaleTensors, resumed_state
from mpcore.masters import Masters, WeightEdits, Writes, check_shared, overwrite


class Saving:
    """`state_dict`, `load_state_dict`, and reading and writing state in float32."""

    inner: torch.optim.Optimizer
    loss_scaling: LossScale
    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    _began: bool
    _climb: Any
    _edits: WeightEdits
    _losses: Losses
    _masters: Masters
    _module: Backend
    _saturated: Tensor
    _scale: LossScaleTensors
    _stage: Stage
    _writes: Writes
    _saves_compact: bool = False  # what the hook of `state_dict` is going to do
    _optimizer_load_state_dict_pre_hooks: OrderedDict[int, Any]
    _optimizer_load_state_dict_post_hooks: OrderedDict[int, Any]

    @outside_graphs
    def state_dict(self, *, compact: bool = False) -> dict[str, Any]:
        """Returns masters, moments, options, loss scale and counters; syncs with the host.

        Args:
            compact: Masters and moments as they lie in memory: fewer bytes with `masters=` or
                `moments=`, to be loaded by an optimizer that keeps them so, together with the
                model's weights, which are a part of the masters. By default they are float32, in
                memory of their own where they lie otherwise, and any optimizer loads them.

        Raises:
            StageError: An exception has left half a step, a step in two calls has only had its
                first, or the state of a parameter in no group is there.
        """
        self._saves_compact = compact
        try:
            saved: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        finally:
            self._saves_compact = False
        return saved

    @outside_graphs
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, in its dtypes; syncs for shared masters or monitors.

        The settings of the loss scale stay those of this object: a saved scale outside its bounds
        is moved into them, and a scale that never moves stays. Load the model's weights as
        well: masters come from here, weights from the model.

        Args:
            state_dict: Left as it is.

        Raises:
            ArgumentError: It does not fit, or another optimizer that shares a parameter has loaded
                another master of it; nothing has changed then.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        saved = read_section(state_dict, self._losses)
        stepped = saved.loss_scale.steps > saved.loss_scale.skipped_steps
        options, states, param_of = read_states(
            state_dict, self.inner, self._masters, stepped=stepped
        )
        sums = section_in(state_dict).get("accumulated")
        accumulated = read_sums(sums, param_of, self._losses.each, self._scale.scale.device)
        check_shared(self._masters, self._masters.shared_in(states), self.param_groups, loaded=True)
        self._writes.begin()
        for group, saved_options in zip(self.param_groups, options, strict=True):
            group.update(saved_options)
        self._masters.replace_state(states)
        self._edits.forget()
        resumed = resumed_state(self.loss_scaling, saved.loss_scale)
        self._scale.assign_(resumed)
        self._saturated.fill_(saved.saturated)
        self._climb = None
        self._stage.start_anew(resumed.overflows_at_min)
        self._stage.resume(accumulated)
        self._losses.resume(saved.losses, saved.totals)
        self._began = True
        self._writes.end()
        if self._stage.watcher is not None:
            self._stage.watcher.note_loaded()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @outside_graphs
    def float32_state(self, param: Tensor) -> dict[str, Any]:
        """Returns copies of a parameter's master and state, in float32; no host sync.

        Args:
            param: One of this optimizer.

        Returns:
            "master" if the parameter has one, and what `state[param]` has besides.

        Raises:
            ArgumentError: The optimizer does not hold `param`.

        Example:
            >>> import torch, mpcore
            >>> weight = torch.nn.Parameter(torch.ones(2).bfloat16())
            >>> sgd = torch.optim.SGD([weight], lr=2.0**-10)
            >>> optimizer = mpcore.MixedPrecisionOptimizer(
            ...     sgd, mpcore.NoLossScale(), backend="reference", masters="split"
            ... )
            >>> weight.grad = torch.ones_like(weight)
            >>> optimizer.step()
            >>> weight.tolist(), optimizer.state[weight]["remainder"].tolist()
            ([1.0, 1.0], [-16384, -16384])
            >>> optimizer.float32_state(weight)["master"].tolist()
            [0.9990234375, 0.9990234375]
        """
        self._check_holds("float32_state", param)
        self._masters.take_over_edits(self.state, self.param_groups)
        return map_tensors(self._masters.float32_state(param), _copied)  # type: ignore[no-any-return]

    @outside_graphs
    def set_float32_state(self, param: Tensor, values: Mapping[str, Tensor]) -> None:
        """Writes a parameter's master, its weight with it, and moments; no host sync.

        Args:
            param: One of this optimizer.
            values: "master", or names of what `state[param]` has; floating tensors of the shape
                that is there. What is not named stays.

        Raises:
            ArgumentError: The optimizer does not hold `param`, or a value has another shape, or
                stands under a name that is not there. Nothing has changed then.
            StageError: Half a step was left, or a step in two calls has only had its first.
        """
        self._check_between_steps("set_float32_state()")
        self._check_holds("set_float32_state", param)
        self._masters.take_over_edits(self.state, self.param_groups)
        if "master" in values and param.dtype in SIXTEEN_BIT:
            self._masters.create_for([param])
        there = self._masters.float32_state(param)
        for name, value in values.items():
            held = there.get(name)
            if not isinstance(held, Tensor):
                raise ArgumentError(
                    f"set_float32_state: expected tensors of {list(there)}, got {name!r} too."
                )
            if not value.is_floating_point() or value.shape != held.shape:
                raise ArgumentError(
                    f"set_float32_state: {name!r}: expected a floating tensor of shape "
                    f"{list(held.shape)}, got {list(value.shape)} in {value.dtype}."
                )
        with torch.no_grad():
            for name, value in values.items():
                if name != "master":
                    self._masters.moments.write(self.state[param], name, value)
        if "master" in values:
            overwrite(self._masters, [(param, values["master"])], self._module)

    def _check_holds(self, caller: str, param: Tensor) -> None:
        if not any(param is own for group in self.param_groups for own in group["params"]):
            raise ArgumentError(
                f"{caller}: expected a parameter of this optimizer, got {list(param.shape)}, which "
                "it does not hold."
            )

    def _check_between_steps(self, caller: str) -> None:
        raise NotImplementedError


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def take_over_edits(optimizer: Any) -> None:
    """A hook before `state_dict`: a state that somebody replaced has its masters back."""
    optimizer._check_between_steps("state_dict()")
    optimizer._masters.take_over_edits(optimizer.state, optimizer.param_groups)
    known = set(map(id, optimizer._params()))
    for key in optimizer.state:
        if isinstance(key, Tensor) and id(key) not in known:
            raise StageError(
                "state_dict(): expected the state of parameters in param groups, got that of one "
                f"of shape {list(key.shape)} in none. Put the parameter into a group, or delete "
                "its entry from optimizer.state."
            )


def add_section(optimizer: Any, saved: dict[str, Any]) -> None:
    """A hook of `state_dict`: adds what torch's does not know of; syncs with the host."""
    section = new_section(optimizer._scale.to_state(), optimizer.saturated, optimizer._losses)
    for group in saved["param_groups"]:
        group[SECTION] = section
    accumulated = optimizer._stage.accumulated
    if accumulated is not None:
        section = {**section, "accumulated": sums_section(accumulated, optimizer._params())}
    saved[SECTION] = section
    if not optimizer._saves_compact:
        masters = optimizer._masters
        packed = [(n, p) for n, p in enumerate(optimizer._params()) if masters.is_compact(p)]
        saved["state"].update((number, masters.float32_state(param)) for number, param in packed)
