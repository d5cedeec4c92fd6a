"""Coming from other systems, and going back: their checkpoints as ours, ours as torch's.

Every function returns a new dictionary and changes nothing. `load_state_dict` of a
`MixedPrecisionOptimizer` takes those of the `from_` functions and checks them as it checks its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.base import LARGEST_SCALE, SIXTEEN_BIT, SMALLEST_SCALE
from mpcore.checkpoint import SECTION, VERSION
from mpcore.engine import MixedPrecisionOptimizer
from mpcore.errors import ArgumentError
from mpcore.loss_scale import initial_state
from mpcore.masters import upcast
from mpcore.updates import rules_of

State = dict[str, Any]


def from_torch(
    optimizer: MixedPrecisionOptimizer,
    saved: Mapping[str, Any],
    *,
    masters: Sequence[Tensor] | None = None,
    scaler: Mapping[str, Any] | None = None,
) -> State:
    """Returns the state of a plain `torch.optim` optimizer, and of a GradScaler, as one of ours.

    Args:
        optimizer: Which is going to load it: over parameters of the same order and groups.
        saved: `state_dict()` of the optimizer, over float32 parameters.
        masters: The float32 parameters it stepped, in order: `[*model.parameters()]` before the
            model is cast. None: masters are made from the 16-bit weights.
        scaler: `state_dict()` of a `torch.amp.GradScaler` or of `mpcore.GradScaler`. Its scale is
            rounded down to a power of two. None, or that of a disabled one: the optimizer's own
            first scale.

    Raises:
        ArgumentError: `saved` is no such state, or there are not as many masters as parameters.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> adamw, scaler = torch.optim.AdamW([weight]), torch.amp.GradScaler("cpu")
        >>> scaler.scale(weight.sum()).backward()
        >>> scaler.step(adamw)
        >>> half = nn.Parameter(weight.detach().half())
        >>> optimizer = MixedPrecisionOptimizer(torch.optim.AdamW([half]))
        >>> optimizer.load_state_dict(from_torch(optimizer, adamw.state_dict(), masters=[weight]))
        >>> torch.equal(optimizer.state[half]["master"], weight)
        True
    """
    params = optimizer._params()
    if masters is not None and len(masters) != len(params):
        raise ArgumentError(
            f"masters: expected {len(params)} tensors, one for each parameter, got {len(masters)}."
        )
    pairs = zip(params, [None] * len(params) if masters is None else masters, strict=True)
    held = [master if param.dtype in SIXTEEN_BIT else None for param, master in pairs]
    scaler = scaler or {}
    return _assembled(optimizer, saved, held, scaler.get("scale"), scaler.get("_growth_tracker"))


def from_apex(optimizer: MixedPrecisionOptimizer, saved: Mapping[str, Any]) -> State:
    """Returns the state of `apex.fp16_utils.FP16_Optimizer` as one of ours.

    Args:
        optimizer: Which is going to load it: over parameters of the same order and groups.
        saved: `{"loss_scaler": ..., "optimizer_state_dict": ..., "fp32_from_fp16": [[...], ...]}`.
            The scaler is an object with an attribute `cur_scale`, or a dictionary with that key.

    Raises:
        ArgumentError: A key is missing, or there are not as many masters as 16-bit parameters.
    """
    inner, masters = _taken(saved, "optimizer_state_dict", "fp32_from_fp16")
    scaler = saved.get("loss_scaler")
    scale = (
        scaler.get("cur_scale")
        if isinstance(scaler, Mapping)
        else getattr(scaler, "cur_scale", None)
    )
    return _assembled(optimizer, inner, _flattened(optimizer, masters), scale, None)


def from_megatron(optimizer: MixedPrecisionOptimizer, saved: Mapping[str, Any]) -> State:
    """Returns the state of Megatron's `Float16OptimizerWithFloat16Params` as one of ours.

    Args:
        optimizer: Which is going to load it: over parameters of the same order and groups.
        saved: `{"optimizer": ..., "grad_scaler": {"scale", "growth_tracker", ...},
            "fp32_from_fp16_params": [[...], ...]}`, of a single rank.

    Raises:
        ArgumentError: A key is missing, or there are not as many masters as 16-bit parameters.
    """
    inner, masters = _taken(saved, "optimizer", "fp32_from_fp16_params")
    scaler = saved.get("grad_scaler") or {}
    scale, tracker = scaler.get("scale"), scaler.get("growth_tracker")
    return _assembled(optimizer, inner, _flattened(optimizer, masters), scale, tracker)


def from_deepspeed(optimizer: MixedPrecisionOptimizer, saved: Mapping[str, Any]) -> State:
    """Returns the state of DeepSpeed's `FP16_Optimizer`, of one rank without ZeRO, as one of ours.

    Its masters and moments are one flat tensor for each param group; they are cut up.

    Args:
        optimizer: Which is going to load it: over parameters of the same order and groups.
        saved: `{"optimizer_state_dict": ..., "fp32_groups_flat": [...], "cur_scale": ...}`.

    Raises:
        ArgumentError: A key is missing, or a flat tensor has another size than its group.
    """
    inner, flat = _taken(saved, "optimizer_state_dict", "fp32_groups_flat")
    groups = optimizer.param_groups
    if len(flat) != len(groups) or len(inner["param_groups"]) != len(groups):
        raise ArgumentError(
            f"fp32_groups_flat: expected {len(groups)} tensors, one for each param group, got "
            f"{len(flat)}."
        )
    state: dict[int, State] = {}
    new_groups, index = [], 0
    for number, (group, old) in enumerate(zip(groups, inner["param_groups"], strict=True)):
        sizes = [param.numel() for param in group["params"]]
        whole = {"master": flat[number], **inner["state"].get(old["params"][0], {})}
        pieces = _cut_up(whole, group["params"], sizes, f"param group {number}")
        indices = range(index, index + len(sizes))
        state.update(zip(indices, pieces, strict=True))
        new_groups.append({**old, "params": list(indices)})
        index += len(sizes)
    masters = [piece.pop("master") for piece in state.values()]
    expected = {"state": state, "param_groups": new_groups}
    return _assembled(optimizer, expected, masters, saved.get("cur_scale"), None)


def to_torch(optimizer: MixedPrecisionOptimizer) -> State:
    """Returns what `state_dict()` of the plain optimizer over float32 parameters would be.

    Load it into `torch.optim.AdamW(float32_model.parameters())`, with the weights of
    `float32_state_dict`. Tensors are not copied.
    """
    saved = optimizer.state_dict()
    groups = zip(saved["param_groups"], rules_of(optimizer.inner), strict=True)
    rule_by = {index: rule for group, rule in groups for index in group["params"]}
    state = {}
    for index, values in saved["state"].items():
        if not isinstance(values, dict):  # what belongs to no parameter
            state[index] = values
            continue
        plain = {key: value for key, value in values.items() if key != "master"}
        if (rule := rule_by.get(index)) is not None:
            rule.hand_over(plain)
        if plain:
            state[index] = plain
    plain_groups = [
        {k: v for k, v in group.items() if k != SECTION} for group in saved["param_groups"]
    ]
    return {"state": state, "param_groups": plain_groups}


def float32_state_dict(model: nn.Module, optimizer: MixedPrecisionOptimizer) -> dict[str, Any]:
    """Returns `model.state_dict()` in float32: masters where there are some, the rest widened.

    Args:
        model: Whose parameters the optimizer steps.
        optimizer: Holds the masters.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> weight = model.weight.detach().clone()
        >>> optimizer = MixedPrecisionOptimizer(torch.optim.AdamW(model.parameters()))
        >>> import mpcore
        >>> model = mpcore.cast_model(model, torch.bfloat16, optimizer)
        >>> torch.equal(float32_state_dict(model, optimizer)["weight"], weight)
        True
    """
    optimizer._masters.take_over_edits(optimizer.state, optimizer.param_groups)
    values = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            values[name] = value
            continue
        held = optimizer._masters.value_of(value).detach()
        values[name] = held.float() if held.dtype in SIXTEEN_BIT else held
    return values


def _taken(saved: Mapping[str, Any], *keys: str) -> tuple[Any, ...]:
    for key in keys:
        if key not in saved:
            raise ArgumentError(f"saved: expected the key {key!r}, got {list(saved)}.")
    return tuple(saved[key] for key in keys)


def _flattened(
    optimizer: MixedPrecisionOptimizer, masters: Sequence[Sequence[Tensor]]
) -> list[Tensor | None]:
    """Returns masters that came in lists for each group, for each parameter in turn."""
    params = optimizer._params()
    flat = [master for group in masters for master in group]
    wanted = sum(param.dtype in SIXTEEN_BIT for param in params)
    if len(flat) != wanted:
        raise ArgumentError(
            f"masters: expected {wanted}, one for each 16-bit parameter, got {len(flat)}."
        )
    held = iter(flat)
    return [next(held) if param.dtype in SIXTEEN_BIT else None for param in params]


def _cut_up(
    whole: State, params: Sequence[Tensor], sizes: Sequence[int], where: str
) -> list[State]:
    """Returns the state of each parameter out of that of all of them as one flat tensor."""
    pieces: list[State] = [{} for _ in params]
    for key, value in whole.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            for piece in pieces:
                piece[key] = value
            continue
        if value.numel() != sum(sizes):
            raise ArgumentError(
                f"{where}: expected {key!r} of {sum(sizes)} elements, got {value.numel()}."
            )
        for piece, part, param in zip(pieces, torch.split(value, list(sizes)), params, strict=True):
            piece[key] = part.view(param.shape)
    return pieces


def _assembled(
    optimizer: MixedPrecisionOptimizer,
    inner: Mapping[str, Any],
    masters: Sequence[Tensor | None],
    scale: Any,
    tracker: Any,
) -> State:
    """Returns a state_dict of ours: a plain optimizer's, with masters and a loss scale."""
    for key in ("state", "param_groups"):
        if key not in inner:
            raise ArgumentError(f"saved: expected the key {key!r}, got {list(inner)}.")
    indices = [index for group in inner["param_groups"] for index in group["params"]]
    params = optimizer._params()
    if len(indices) != len(params):
        raise ArgumentError(f"saved: expected {len(params)} parameters, got {len(indices)}.")
    state = {}
    for index, master in zip(indices, masters, strict=True):
        values = upcast(dict(inner["state"].get(index, {})))
        if master is not None:
            values = {"master": master.detach().float(), **values}
        if values:
            state[index] = values
    state |= {key: value for key, value in inner["state"].items() if key not in indices}
    numbers = initial_state(optimizer.loss_scaling)
    if scale is not None:
        numbers = numbers._replace(scale=_power_of_two(float(scale)))
    if tracker is not None:
        numbers = numbers._replace(growth_tracker=int(tracker))
    return {
        "state": state,
        # an older torch knew fewer options; those it lacks stay
        "param_groups": [
            {**_options(own), **group}
            for own, group in zip(optimizer.param_groups, inner["param_groups"], strict=False)
        ],
        "mpcore": {"version": VERSION, "loss_scale": numbers._asdict(), "saturated": 0},
    }


def _options(group: State) -> State:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _power_of_two(scale: float) -> float:
    """Returns the largest power of two that is not above a scale, which may be 0 or infinite."""
    if not scale > SMALLEST_SCALE:
        return SMALLEST_SCALE
    return min(2.0 ** (math.frexp(min(scale, LARGEST_SCALE))[1] - 1), LARGEST_SCALE)
