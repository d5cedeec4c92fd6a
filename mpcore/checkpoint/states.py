"""The part of a state_dict that torch.optim has too: who it belongs to, and whether it fits."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpcore.base import SIXTEEN_BIT, any_dtensor, map_tensors, sharded_like
from mpcore.checkpoint.entries import check_complete, check_kinds, check_state, known_names
from mpcore.checkpoint.section import SECTION
from mpcore.errors import ArgumentError
from mpcore.masters import Groups, Masters, scales_of
from mpcore.updates import UpdateRule, rules_of

State = dict[str, Any]
# what else is in a param group
_NO_OPTIONS = ("params", "param_names", SECTION)


class Saved(NamedTuple):
    """What goes where.

    Attributes:
        options: New options of each param group; copies.
        states: Per parameter its state, on its device and in the saved dtypes, and under their
            own keys the values that belong to no parameter; copies.
        param_of: The parameters by their number, or whatever stands for it, in the state_dict.
    """

    options: list[State]
    states: dict[Any, Any]
    param_of: dict[Any, Tensor]


def read_states(
    state_dict: State, inner: torch.optim.Optimizer, masters: Masters, *, stepped: bool = False
) -> Saved:
    """Returns the states and options of a state_dict, checked; no host sync.

    Parameters that have names on both sides are matched by name, whatever their order and groups;
    others by position.

    Args:
        state_dict: As from `MixedPrecisionOptimizer.state_dict()`.
        inner: The wrapped optimizer. States of one that has an update rule are checked key by key.
        masters: Say how masters and moments are kept: they may be saved so, or in float32.
        stepped: Whether steps were taken, so that somewhere there have to be moments.

    Raises:
        ArgumentError: Something is missing, foreign, or of another shape or dtype; the message
            names the key.
    """
    groups, rules, held = inner.param_groups, rules_of(inner), masters.held
    saved_groups, saved_states = _checked_layout(state_dict)
    matches = _matched(groups, saved_groups)
    sources = [(f'state_dict["param_groups"][{n}]', saved_groups[n]) for _, n in matches]
    for (where, saved), group in zip(sources, groups, strict=True):
        check_kinds(where, saved, group, inner.defaults)
    states: dict[Tensor, State] = {}
    for group, rule, (indices, source) in zip(groups, rules, matches, strict=True):
        for param, index in zip(group["params"], indices, strict=True):
            if index in saved_states:
                where = f'state_dict["state"][{index}]'
                saved_group = {**group, **saved_groups[source]}
                names = None if rule is None else known_names(rule, saved_group, masters)
                check_state(where, saved_states[index], param, names, masters)
                check_complete(where, saved_states[index], rule, names)
                on_device = bool(group.get("capturable") or group.get("fused"))
                states[param] = _for(param, saved_states[index], on_device)
    foreign = set(saved_states) - {index for indices, _ in matches for index in indices}
    by_number = all(type(index) is int for indices, _ in matches for index in indices)
    pairs = zip(groups, rules, strict=True)
    moments = {n for group, rule in pairs if rule is not None for n in rule.moments(group)}
    known = {*held.names, "step", *moments}
    others = {
        key
        for key in foreign  # torch keeps what belongs to no parameter in the same dictionary
        if by_number and isinstance(key, str) and not _has_any(saved_states[key], known)
    }
    if foreign - others:
        raise ArgumentError(
            'state_dict["state"]: expected states of the parameters of its groups, got '
            f"{foreign - others}."
        )
    options = _filled(inner, sources, states, masters)
    home = groups[0]["params"][0].device if groups and groups[0]["params"] else torch.device("cpu")
    kept = {key: _moved(saved_states[key], home, True) for key in others}
    if stepped:
        _check_not_left_out(states, groups, rules, masters)
    param_of = {
        index: param
        for group, (indices, _) in zip(groups, matches, strict=True)
        for param, index in zip(group["params"], indices, strict=True)
    }
    return Saved(options, {**states, **kept}, param_of)


def _checked_layout(state_dict: State) -> tuple[list[State], dict[Any, State]]:
    """Returns groups and states; raises unless they are lists of dictionaries and dictionaries."""
    for key, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(key), kind):
            raise ArgumentError(
                f"state_dict: expected the key {key!r} with a {kind.__name__}, got "
                f"{type(state_dict[key]).__name__ if key in state_dict else list(state_dict)}."
            )
    groups, states = state_dict["param_groups"], state_dict["state"]
    for number, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise ArgumentError(
                f'state_dict["param_groups"][{number}]: expected a dictionary with a list "params".'
            )
    indices = [index for group in groups for index in group["params"]]
    # torch.distributed.checkpoint puts names in the place of numbers
    plain = all(type(index) in (int, str) for index in indices)
    if not plain or len(set(indices)) < len(indices):
        raise ArgumentError(
            'state_dict["param_groups"]: expected each parameter once, by number or name.'
        )
    for index, state in states.items():
        if not isinstance(state, dict) and index in indices:
            raise ArgumentError(
                f'state_dict["state"][{index!r}]: expected a dictionary, got '
                f"{type(state).__name__}."
            )
    return groups, states


def _matched(groups: Groups, saved_groups: list[State]) -> list[tuple[list[Any], int]]:
    """Returns for each group the saved indices of its parameters, and the group it comes from."""
    if all("param_names" in group for group in (*groups, *saved_groups)):
        return _matched_by_name(groups, saved_groups)
    saved_sizes = [len(group["params"]) for group in saved_groups]
    sizes = [len(group["params"]) for group in groups]
    if saved_sizes != sizes:
        raise ArgumentError(
            f'state_dict["param_groups"]: expected groups of {sizes} parameters, got {saved_sizes}.'
        )
    return [(group["params"], number) for number, group in enumerate(saved_groups)]


def _matched_by_name(groups: Groups, saved_groups: list[State]) -> list[tuple[list[Any], int]]:
    place: dict[str, tuple[Any, int]] = {}
    for number, group in enumerate(saved_groups):
        names = group["param_names"]
        usable = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not usable or len(names) != len(group["params"]):
            raise ArgumentError(
                f'state_dict["param_groups"][{number}]["param_names"]: expected one name for each '
                "parameter."
            )
        place.update(zip(names, ((i, number) for i in group["params"]), strict=True))
    own = {name for group in groups for name in group["param_names"]}
    missing, foreign = sorted(own - set(place)), sorted(set(place) - own, key=str)
    if missing or foreign:
        raise ArgumentError(
            f'state_dict["param_groups"]: expected the parameters of this optimizer, got none for '
            f"{missing[:3]} and unknown {foreign[:3]}."
        )
    result = []
    for group in groups:
        places = [place[name] for name in group["param_names"]]
        result.append(([index for index, _ in places], places[0][1] if places else 0))
    return result


def _filled(
    inner: torch.optim.Optimizer,
    sources: list[tuple[str, State]],
    states: dict[Tensor, State],
    masters: Masters,
) -> list[State]:
    """Returns the options of each group; they and `states` as this version of torch wants them.

    Optimizers fill in what an older version did not save, options and kinds of step counts, in
    their `__setstate__`: a stand-in is given what was saved.

    Raises:
        ArgumentError: An option is missing that the optimizer does not fill in, or one is of
            another kind, or the optimizer cannot read the state.
    """
    groups = inner.param_groups
    options = [
        _own_options(where, saved, group)
        for (where, saved), group in zip(sources, groups, strict=True)
    ]
    given = [{**own, "params": group["params"]} for own, group in zip(options, groups, strict=True)]
    plain = {param: masters.held.without_parts(state) for param, state in states.items()}
    state = defaultdict(dict, {param: values for param, values in plain.items() if values})
    stand_in: Any = type(inner).__new__(type(inner))
    stand_in.__dict__.update(inner.__dict__, defaults=dict(inner.defaults))
    try:
        stand_in.__setstate__({"state": state, "param_groups": given})
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArgumentError(
            f"state_dict: expected the state of a {type(inner).__name__}, got one that it cannot "
            f"read: {type(error).__name__}: {error}."
        ) from error
    for (where, saved), group, own in zip(sources, groups, given, strict=True):
        missing = [name for name in inner.defaults if name in group and name not in own]
        if missing:
            raise ArgumentError(f"{where}: expected the option {missing[0]!r}, got {list(saved)}.")
    for param, values in state.items():
        if param in states:
            states[param].update(values)
    return [{k: v for k, v in group.items() if k != "params"} for group in given]


def _own_options(where: str, saved: State, group: State) -> State:
    """Returns a copy of the options that were saved."""
    if not all(isinstance(name, str) for name in saved):
        raise ArgumentError(f"{where}: expected names of options, got {list(saved)}.")
    options = copy.deepcopy({k: v for k, v in saved.items() if k not in _NO_OPTIONS})
    for name, value in options.items():
        if isinstance(value, list) and isinstance(group.get(name), tuple):
            options[name] = tuple(value)  # torch.distributed.checkpoint makes lists of tuples
    return options


def _check_not_left_out(
    states: dict[Tensor, State],
    groups: Sequence[State],
    rules: Sequence[UpdateRule | None],
    masters: Masters,
) -> None:
    """Raises if no parameter has masters or moments that there must be after a step.

    In a chain nobody knows the moments of some optimizers: if these have any, the others may have
    had no gradient yet.
    """
    found = {name for state in states.values() for name, v in state.items() if v is not None}
    stepped = list(states) or [param for group in groups for param in group["params"]]
    moments: set[str] = set()
    begun, held = False, masters.held
    for group, rule in zip(groups, rules, strict=True):
        if rule is not None:
            moments.update(rule.moments(group))
        else:
            begun |= any(set(states.get(p, ())) - set(held.names) for p in group["params"])
    any_half = any(param.dtype in SIXTEEN_BIT for param in stepped)
    needs_master = any_half and held.store != "none" and found.isdisjoint(held.names)
    wanted = {"master"} if needs_master else set()
    if not (begun or moments & found):
        wanted |= moments
    missing = sorted(wanted - found)
    if missing:
        raise ArgumentError(
            f'state_dict["state"]: expected {", ".join(missing)} after the steps that were taken, '
            f"got {', '.join(sorted(found)) or 'nothing'} alone. torch.distributed.checkpoint "
            "reads what the optimizer has already: let it create its state before, by one step() "
            "over gradients of zeros."
        )


def _has_any(value: Any, names: set[str]) -> bool:
    return isinstance(value, dict) and not names.isdisjoint(value)


def _for(param: Tensor, saved: State, on_device: bool) -> State:
    """Returns a copy of a state, where its parameter is, and sharded as that is.

    Args:
        param: Whose state it is.
        saved: The state.
        on_device: Whether the step count goes there as well; torch.optim keeps it on the host.
    """
    found = {
        key: _moved(value, param.device, key == "step" and not on_device)
        for key, value in saved.items()
    }
    if not any_dtensor([param]):
        return found
    shape, scales = param.shape, {*map(scales_of, found)} & {*found}
    return {
        key: sharded_like(param, value)
        if key in scales
        else value
        if key == "step"
        else map_tensors(value, lambda t: sharded_like(param, t) if t.shape == shape else t)
        for key, value in found.items()
    }


def _moved(value: Any, device: torch.device, keep_device: bool) -> Any:
    """Returns a copy of `value` on `device`; torch.optim keeps host step counts on the host."""
    if keep_device:
        return map_tensors(value, lambda tensor: tensor.detach().clone())
    return map_tensors(value, lambda tensor: tensor.detach().to(device, copy=True))
