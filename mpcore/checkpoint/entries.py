"""Checks of one entry of a state_dict: the state of a parameter, the options of its group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpcore.base import SIXTEEN_BIT, is_placed_otherwise
from mpcore.errors import ArgumentError
from mpcore.masters import (
    MASTER_KEYS,
    RANDOM_KEY,
    HeldMasters,
    Masters,
    cover_rows,
    scales_of,
)
from mpcore.stores import scales_shape
from mpcore.updates import UpdateRule

State = dict[str, Any]


def check_kinds(where: str, saved: State, group: State, defaults: State) -> None:
    """Raises if an option that is there is of another kind than that of now."""
    for name in defaults:
        current = group.get(name)
        if name in saved and kind(current) is not None and kind(saved[name]) != kind(current):
            raise ArgumentError(
                f"{where}[{name!r}]: expected something like {current!r}, got {saved[name]!r}."
            )


def kind(value: Any) -> Any:
    """Returns what two values of one option have in common; None for what may be anything."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
        return "number"
    if isinstance(value, (list, tuple)):
        return tuple(kind(item) for item in value)
    return None


def known_names(rule: UpdateRule, group: State, masters: Masters) -> dict[str, bool]:
    """Returns what a state may hold under an update rule: name -> whether it is a moment."""
    moments, others = rule.moments(group), ["step", *masters.held.names]
    others += [] if masters.fused_only is None else [RANDOM_KEY]
    others += map(scales_of, moments) if masters.moments.kept == "int8" else []
    return {**dict.fromkeys(moments, True), **dict.fromkeys(others, False)}


def check_state(
    where: str, saved: State, param: Tensor, names: dict[str, bool] | None, masters: Masters
) -> None:
    """Raises, naming the key, unless a state is one of `param`.

    Args:
        where: Which one it is.
        saved: The state.
        param: Whose it shall be.
        names: From `known_names`; None: of an optimizer of its own, nobody knows what it keeps.
        masters: Say how masters and moments are kept.
    """
    held, beside = masters.held, {RANDOM_KEY, *map(scales_of, saved)}
    _check_parts(where, saved, param, held)
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    # one that was never stepped has no master, and the moments that its optimizer made
    dtypes = {wide} if held.parts(saved) else {wide, param.dtype}
    for key, value in saved.items():
        is_part = key in held.names
        if not is_part and names is None:
            continue
        if names is not None and key not in names:
            hint = ""
            if key in beside:
                hint = " Load a state_dict(compact=True) with the masters= and moments= of its run."
            raise ArgumentError(f"{where}: expected the keys {list(names)}, got {key!r} too.{hint}")
        if key in beside:
            _check_beside(f"{where}[{key!r}]", key, value)
        elif key == "step":
            if kind(value) != "number":
                raise ArgumentError(f"{where}[{key!r}]: expected a number, got {value!r}.")
        elif hasattr(value, "placements") and not hasattr(param, "placements"):
            raise ArgumentError(
                f"{where}[{key!r}]: expected a tensor, since the parameter is one, got a DTensor. "
                "torch.distributed.checkpoint loads what was saved sharded into any layout."
            )
        elif _cannot_be_placed(f"{where}[{key!r}]", value, param, is_part=is_part):
            raise ArgumentError(
                f"{where}[{key!r}]: expected the placements of the parameter, got others, and no "
                f"process group sends {value.dtype}. Save without compact=True, or load through "
                "torch.distributed.checkpoint."
            )
        elif is_part:
            _check_tensor(f"{where}[{key!r}]", value, param, {held.dtype_of(key)})
        elif value is not None:
            compact = masters.moments.dtypes if names is not None and names[key] else ()
            _check_tensor(f"{where}[{key!r}]", value, param, {*dtypes, *compact})
            _check_scales(f"{where}[{scales_of(key)!r}]", value, saved.get(scales_of(key)))


def _cannot_be_placed(where: str, value: Any, param: Tensor, *, is_part: bool) -> bool:
    """Whether a value would have to be sent in integers, or codes be shared without their rows."""
    otherwise = is_placed_otherwise(param, value, where)
    if not isinstance(value, Tensor) or value.is_floating_point():
        return False
    return otherwise or not (is_part or cover_rows(param))


def _check_beside(where: str, key: str, value: Any) -> None:
    """Raises unless what is beside moments can be that: a key of random bits, or scales."""
    if key == RANDOM_KEY and not (type(value) is int and 0 <= value < 2**64):
        raise ArgumentError(f"{where}: expected an integer below 2^64, got {value!r}.")
    if key != RANDOM_KEY and not isinstance(value, Tensor):
        raise ArgumentError(f"{where}: expected a float32 tensor, got {value!r}.")


def _check_scales(where: str, value: Tensor, scales: Any) -> None:
    """Raises unless there are scales beside codes, and none beside what are none."""
    if value.is_floating_point():
        wanted, shape = scales is None, None
    else:
        shape = scales_shape(value.shape) if value.dim() else (0, 0)
        fits = isinstance(scales, Tensor) and tuple(scales.shape) == shape
        wanted = fits and scales.dtype == torch.float32
    if not wanted:
        got = f"{scales.dtype} {list(scales.shape)}" if isinstance(scales, Tensor) else scales
        raise ArgumentError(
            f"{where}: expected {'none' if shape is None else f'float32 {list(shape)}'} beside a "
            f"moment of {value.dtype}, got {got}."
        )


def _check_parts(where: str, saved: State, param: Tensor, held: HeldMasters) -> None:
    """Raises unless what a state holds of a master is what `held` can take."""
    given = [key for key in MASTER_KEYS if key in saved]
    foreign = [key for key in given if key not in held.names]
    if foreign:
        raise ArgumentError(
            f'{where}: expected a float32 "master", got {foreign[0]!r} of a state_dict(compact='
            f"True), which an optimizer with masters={held.store!r} cannot read. Load it, and the "
            "weights, into one with the masters= it was saved from; its state_dict() fits all."
        )
    if len(given) > 1:
        raise ArgumentError(f"{where}: expected one of {given}, got all of them.")
    if given and param.dtype not in SIXTEEN_BIT and saved[given[0]] is not None:
        raise ArgumentError(
            f"{where}[{given[0]!r}]: expected none, since the parameter is {param.dtype}, got one. "
            "Cast the model to the 16-bit dtype that was saved first."
        )


def _check_tensor(where: str, value: Any, param: Tensor, dtypes: set[torch.dtype]) -> None:
    if isinstance(value, Tensor) and value.dtype in dtypes and value.shape == param.shape:
        return
    got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    float32 = {torch.float32} & dtypes
    wanted = next(iter(float32 or dtypes - {param.dtype}), param.dtype)
    raise ArgumentError(
        f"{where}: expected a {wanted} tensor of shape {list(param.shape)}, got {got}."
    )


def check_complete(
    where: str, saved: State, rule: UpdateRule | None, names: dict[str, bool] | None
) -> None:
    """Raises if one of the values that were made together is missing."""
    if rule is None or names is None:
        return
    wanted = [name for name, is_moment in names.items() if is_moment]
    wanted += ["step"] if rule.keeps_steps else []
    missing = [name for name in wanted if saved.get(name) is None]
    if missing and len(missing) < len(wanted):
        raise ArgumentError(f"{where}: expected the keys {wanted}, got none for {missing}.")
