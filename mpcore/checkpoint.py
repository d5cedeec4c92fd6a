"""The optimizer's state_dict: torch's layout plus one versioned section.

    {"state": {0: {"master": ..., "exp_avg": ...}, ...},      # as torch.optim, plus the masters
     "param_groups": [...],                                   # as torch.optim
     "mpcore": {"version": 1, "loss_scale": {...}, "saturated": 0}}

Plain tensors, numbers and strings only, so it loads with `weights_only=True`. torch's own
`load_state_dict` would round float32 masters and moments to the parameter's 16 bits
(pytorch issue 43706); this one keeps every dtype. It checks everything before it changes anything.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mpcore._checks import SIXTEEN_BIT, check_scale
from mpcore.errors import ArgumentError
from mpcore.loss_scale import LossScaleState

VERSION = 1

State = dict[str, Any]


def section(loss_scale: LossScaleState, saturated: int) -> State:
    """Returns the `"mpcore"` section of a state_dict."""
    return {"version": VERSION, "loss_scale": loss_scale._asdict(), "saturated": saturated}


def read_section(state_dict: State) -> tuple[LossScaleState, int]:
    """Returns what `section` was made from; raises `ArgumentError` if it is not all there."""
    found = state_dict.get("mpcore")
    if not isinstance(found, dict) or found.get("version") != VERSION:
        got = found.get("version") if isinstance(found, dict) else "none"
        raise ArgumentError(
            f'state_dict: expected a section "mpcore" of version {VERSION}, got {got}. '
            "Was it saved by MixedPrecisionOptimizer.state_dict()?"
        )
    numbers = found.get("loss_scale")
    if isinstance(numbers, dict):  # files from before there was a HeadroomLossScale have no peaks
        numbers = {**LossScaleState._field_defaults, **numbers}
    if not isinstance(numbers, dict) or set(numbers) != set(LossScaleState._fields):
        raise ArgumentError(
            f'state_dict["mpcore"]["loss_scale"]: expected the keys {LossScaleState._fields}, '
            f"got {numbers!r}."
        )
    if not isinstance(numbers["scale"], float):
        raise ArgumentError(
            'state_dict["mpcore"]["loss_scale"]["scale"]: expected a float, '
            f"got {numbers['scale']!r}."
        )
    check_scale('state_dict["mpcore"]["loss_scale"]["scale"]', numbers["scale"])
    counts = {**numbers, "saturated": found.get("saturated")}
    del counts["scale"]
    for name in ("peak", "peak_before"):
        peak = counts.pop(name)
        if not isinstance(peak, float) or not 0 <= peak < math.inf:
            raise ArgumentError(
                f'state_dict["mpcore"]["loss_scale"][{name!r}]: expected a finite float of at '
                f"least 0, got {peak!r}."
            )
    for name, count in counts.items():
        # one below the largest int32: the tracker is counted up before it is compared
        limit = 2**31 - 1 if name in ("growth_tracker", "overflows_left") else 2**63
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < limit:
            raise ArgumentError(
                f'state_dict["mpcore"]: expected {name!r} to be an integer from 0 to {limit - 1}, '
                f"got {count!r}."
            )
    return LossScaleState(**numbers), found["saturated"]


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
