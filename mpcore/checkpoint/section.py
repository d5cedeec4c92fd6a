"""The optimizer's state_dict: torch's layout plus one versioned section.

    {"state": {0: {"master": ..., "exp_avg": ...}, ...},      # as torch.optim, plus the masters
     "param_groups": [...],                                   # as torch.optim
     "mpcore": {"version": 1, "loss_scale": {...}, "saturated": 0,
                "losses": {"gan": {...}}, "totals": [...],          # if add_loss was called
                "accumulated": {...}}}                              # within a step

The section is in each param group once more, under the same key and without "accumulated":
`torch.distributed.checkpoint` keeps nothing that is in neither a state nor a group.

Plain tensors, numbers and strings only, so it loads with `weights_only=True`. torch's own
`load_state_dict` would round float32 masters and moments to the parameter's 16 bits
(pytorch issue 43706); this one keeps every dtype. It checks everything before it changes anything.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from mpcore.base import check_scale
from mpcore.errors import ArgumentError
from mpcore.loss_scale import COMPARABLE_STEPS, COUNTERS, Losses, LossScaleState

#: The key of a state_dict for what torch.optim has no place for. Param groups have it as well:
#: `torch.distributed.checkpoint` carries their keys, those that are there, and nothing beside them.
SECTION = "mpcore"
VERSION = 1

# where counters end that are int32, or are multiplied; one less, since the tracker is counted up
# before it is compared
_LIMITS = {
    **dict.fromkeys(("growth_tracker", "overflows_left"), 2**31 - 1),
    **dict.fromkeys(("steps_since_move", "overflows_since_move"), COMPARABLE_STEPS),
}

_KEYS = {"version", "loss_scale", "saturated", "losses", "totals", "accumulated"}

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


def new_section(loss_scale: LossScaleState, saturated: int, losses: Losses) -> State:
    """Returns the `"mpcore"` section of a state_dict; syncs with the host."""
    saved = {"version": VERSION, "loss_scale": loss_scale._asdict(), "saturated": saturated}
    if losses.totals is not None:
        each = {name: state._asdict() for name, state in losses.to_states().items()}
        saved |= {"losses": each, "totals": losses.totals.tolist()}
    return saved


def read_section(state_dict: State, losses: Losses) -> Section:
    """Returns what `section` was made from; raises `ArgumentError` if it is not all there."""
    found = section_in(state_dict)
    version = found.get("version") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(version, int) or version != VERSION:
        got = found.get("version") if isinstance(found, dict) else "none"
        raise ArgumentError(
            f'state_dict: expected a section "mpcore" of version {VERSION}, got {got}. '
            "A plain torch.optim state, or one of another system, is made into ours by "
            "mpcore.migration, e.g. mpcore.migration.from_torch(optimizer, state_dict)."
        )
    where = 'state_dict["mpcore"]'
    if not set(found) <= _KEYS:
        raise ArgumentError(f"{where}: expected keys of {sorted(_KEYS)}, got {list(found)}.")
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


def section_in(state_dict: State) -> Any:
    """Returns the `"mpcore"` section, or the first copy of it in a param group."""
    groups = state_dict.get("param_groups")
    groups = groups if isinstance(groups, list) else []
    copies = [group.get(SECTION) for group in groups if isinstance(group, dict)]
    return next((s for s in (state_dict.get(SECTION), *copies) if s is not None), None)


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
