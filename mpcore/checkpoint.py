"""The optimizer's state_dict: torch's layout plus one versioned section.

    {"state": {0: {"master": ..., "exp_avg": ...}, ...},      # as torch.optim, plus the masters
     "param_groups": [...],                                   # as torch.optim
     "mpcore": {"version": 1, "loss_scale": {...}, "saturated": 0,
                "losses": {"gan": {...}}, "totals": [...]}}         # if add_loss was called

Plain tensors, numbers and strings only, so it loads with `weights_only=True`. torch's own
`load_state_dict` would round float32 masters and moments to the parameter's 16 bits
(pytorch issue 43706); this one keeps every dtype. It checks everything before it changes anything.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpcore._checks import SIXTEEN_BIT, check_scale
from mpcore.errors import ArgumentError
from mpcore.loss_scale import COUNTERS, LossScaleState
from mpcore.losses import Losses

VERSION = 1

# where counters end that are int32, or are multiplied; one less, since the tracker is counted up
# before it is compared
_LIMITS = {
    **dict.fromkeys(("growth_tracker", "overflows_left"), 2**31 - 1),
    **dict.fromkeys(("steps_since_move", "overflows_since_move"), 2**42),
}

State = dict[str, Any]


class Section(NamedTuple):
    """What the `"mpcore"` section of a state_dict holds, read and checked.

    Attributes:
        loss_scale: The state of the optimizer's own scale.
        saturated: How many weights were clamped.
        losses: The states of `add_loss`'s, by name.
        totals: Counters of all steps, if there are any of these.
    """

    loss_scale: LossScaleState
    saturated: int
    losses: dict[str, LossScaleState]
    totals: tuple[int, ...]


def section(loss_scale: LossScaleState, saturated: int, losses: Losses) -> State:
    """Returns the `"mpcore"` section of a state_dict; syncs with the host."""
    saved = {"version": VERSION, "loss_scale": loss_scale._asdict(), "saturated": saturated}
    if losses.totals is not None:
        each = {name: state._asdict() for name, state in losses.to_states().items()}
        saved |= {"losses": each, "totals": losses.totals.tolist()}
    return saved


def read_section(state_dict: State, losses: Losses) -> Section:
    """Returns what `section` was made from; raises `ArgumentError` if it is not all there."""
    found = state_dict.get("mpcore")
    if not isinstance(found, dict) or found.get("version") != VERSION:
        got = found.get("version") if isinstance(found, dict) else "none"
        raise ArgumentError(
            f'state_dict: expected a section "mpcore" of version {VERSION}, got {got}. '
            "Was it saved by MixedPrecisionOptimizer.state_dict()?"
        )
    where = 'state_dict["mpcore"]'
    own = _read_scale(f'{where}["loss_scale"]', found.get("loss_scale"))
    saturated = _read_count(where, "saturated", found.get("saturated"))
    saved = found.get("losses", {})
    if not isinstance(saved, dict) or set(saved) != set(losses.each):
        raise ArgumentError(
            f'{where}["losses"]: expected {list(losses.each)}, the losses of add_loss(), got '
            f"{list(saved) if isinstance(saved, dict) else saved!r}. Add the same ones first."
        )
    states = {name: _read_scale(f'{where}["losses"][{name!r}]', s) for name, s in saved.items()}
    totals = found.get("totals", []) if losses.totals is not None else []
    if not isinstance(totals, list) or len(totals) != (len(COUNTERS) if states else 0):
        raise ArgumentError(
            f'{where}["totals"]: expected a list of {len(COUNTERS)} counters, got {totals!r}.'
        )
    checked = [_read_count(where, "totals", count) for count in totals]
    return Section(own, saturated, states, tuple(checked))


def _read_scale(where: str, numbers: Any) -> LossScaleState:
    """Returns the state of a loss scale; raises, naming `where` it is, if it is none."""
    if isinstance(numbers, dict):  # older files lack what later versions count
        numbers = {**LossScaleState._field_defaults, **numbers}
    if not isinstance(numbers, dict) or set(numbers) != set(LossScaleState._fields):
        raise ArgumentError(
            f"{where}: expected the keys {LossScaleState._fields}, got {numbers!r}."
        )
    if not isinstance(numbers["scale"], float):
        raise ArgumentError(f'{where}["scale"]: expected a float, got {numbers["scale"]!r}.')
    check_scale(f'{where}["scale"]', numbers["scale"])
    for name in ("peak", "peak_before"):
        if not isinstance(numbers[name], float) or not 0 <= numbers[name] < math.inf:
            raise ArgumentError(
                f"{where}[{name!r}]: expected a finite float of at least 0, got {numbers[name]!r}."
            )
    for name in LossScaleState._fields[1:9]:
        _read_count(where, name, numbers[name])
    return LossScaleState(**numbers)


def _read_count(where: str, name: str, count: Any) -> int:
    """Returns a counter; raises, naming it, unless a device can hold it."""
    limit = _LIMITS.get(name, 2**63)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < limit:
        raise ArgumentError(
            f"{where}: expected {name!r} to be an integer from 0 to {limit - 1}, got {count!r}."
        )
    return count


def read_states(state_dict: State, groups: list[State]) -> dict[Tensor, State]:
    """Returns per parameter its saved state, on its device and in the saved dtypes.

    Args:
        state_dict: As from `MixedPrecisionOptimizer.state_dict()`.
        groups: The optimizer's param groups.

    Raises:
        ArgumentError: Groups, parameters or shapes do not match; the message names the key.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ArgumentError(f"state_dict: expected the key {key!r}, got {list(state_dict)}.")
    saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    sizes = [len(group["params"]) for group in groups]
    if saved_sizes != sizes:
        raise ArgumentError(
            f'state_dict["param_groups"]: expected groups of {sizes} parameters, got {saved_sizes}.'
        )
    states: dict[Tensor, State] = {}
    for group, saved_group in zip(groups, state_dict["param_groups"], strict=True):
        for param, index in zip(group["params"], saved_group["params"], strict=True):
            if index in state_dict["state"]:
                saved = state_dict["state"][index]
                _check_master(saved.get("master"), param, index)
                on_device = bool(group.get("capturable") or group.get("fused"))
                states[param] = {
                    key: _moved(value, param.device, key == "step" and not on_device)
                    for key, value in saved.items()
                }
    return states


def _check_master(master: Any, param: Tensor, index: int) -> None:
    if master is None:
        return
    if not isinstance(master, Tensor) or master.dtype != torch.float32:
        raise ArgumentError(f'state_dict["state"][{index}]["master"]: expected a float32 tensor.')
    if param.dtype not in SIXTEEN_BIT:
        raise ArgumentError(
            f'state_dict["state"][{index}]["master"]: expected none, since the parameter is '
            f"{param.dtype}, got one. Cast the model to the 16-bit dtype that was saved first."
        )
    if master.shape != param.shape:
        raise ArgumentError(
            f'state_dict["state"][{index}]["master"]: expected shape {list(param.shape)}, '
            f"got {list(master.shape)}."
        )


def _moved(value: Any, device: torch.device, keep_device: bool) -> Any:
    """Returns a copy of `value` on `device`; torch.optim keeps host step counts on the host."""
    if isinstance(value, Tensor):
        return value.detach().clone() if keep_device else value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: _moved(item, device, keep_device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device, keep_device) for item in value)
    return value
