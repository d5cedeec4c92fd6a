"""The part of a state_dict for a step that has begun: what `accumulate` has added up so far.

{"sums": {0: float32 [..], ...},                                # by number, as in "state"
 "micro_batches": [{"loss": "", "largest": None,                # a backward pass each:
                    "params": [0, 1], "flags": [0, 0]}, ...]}   # whose, not 0: overflowed
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcore.base import sharded_like
from mpcore.errors import ArgumentError
from mpcore.masters import Accumulated, MicroBatch

State = dict[str, Any]


def sums_section(accumulation: Accumulated, params: Sequence[Tensor]) -> State:
    """Returns what has been added up, parameters by number; syncs with the host."""
    number_of = {param: number for number, param in enumerate(params)}
    return {
        "sums": {number_of[param]: total for param, total in accumulation.sums.items()},
        "micro_batches": [
            {
                "loss": micro_batch.loss,
                "largest": None if micro_batch.largest is None else float(micro_batch.largest),
                "params": [number_of[param] for param in micro_batch.flags],
                "flags": [int(flag) for flag in micro_batch.flags.values()],
            }
            for micro_batch in accumulation.micro_batches
        ],
    }


def read_sums(
    found: Any, param_of: Mapping[Any, Tensor], losses: Iterable[str], home: torch.device
) -> Accumulated | None:
    """Returns what `sums_section` was made from, None if there was nothing; no host sync.

    Args:
        found: The section, or None.
        param_of: The parameters by their number in the state_dict.
        losses: The names of `add_loss`'s losses.
        home: Where the loss scale is.

    Raises:
        ArgumentError: It does not fit; the message names the key.
    """
    if found is None:
        return None
    where = 'state_dict["mpcore"]["accumulated"]'
    if not isinstance(found, dict) or set(found) != {"sums", "micro_batches"}:
        raise ArgumentError(
            f'{where}: expected the keys "sums" and "micro_batches", got {found!r}.'
        )
    sums, saved = found["sums"], found["micro_batches"]
    if not isinstance(sums, dict) or not isinstance(saved, list) or not saved:
        raise ArgumentError(f"{where}: expected a dictionary of sums and a list of micro-batches.")
    totals = {}
    for number, total in sums.items():
        param = _param(f'{where}["sums"]', number, param_of)
        totals[param] = _checked_sum(f'{where}["sums"][{number!r}]', total, param)
    micro_batches = [
        _read_micro_batch(f'{where}["micro_batches"][{i}]', one, param_of, {"", *losses}, home)
        for i, one in enumerate(saved)
    ]
    counted = {param for micro_batch in micro_batches for param in micro_batch.flags}
    if counted != set(totals):
        raise ArgumentError(
            f'{where}["sums"]: expected one for each parameter of the micro-batches, got '
            f"{len(totals)} for {len(counted)}."
        )
    return Accumulated(totals, micro_batches)


def _param(where: str, number: Any, param_of: Mapping[Any, Tensor]) -> Tensor:
    if type(number) not in (int, str) or number not in param_of:
        raise ArgumentError(f"{where}: expected numbers of parameters, got {number!r}.")
    return param_of[number]


def _checked_sum(where: str, total: Any, param: Tensor) -> Tensor:
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    fits = isinstance(total, Tensor) and total.dtype == dtype and total.shape == param.shape
    if not fits or (hasattr(total, "placements") and not hasattr(param, "placements")):
        got = f"{total.dtype} {list(total.shape)}" if isinstance(total, Tensor) else repr(total)
        raise ArgumentError(
            f"{where}: expected a {dtype} tensor of shape {list(param.shape)}, placed like the "
            f"parameter, got {got}."
        )
    return torch.empty_like(param, dtype=dtype).copy_(sharded_like(param, total))


def _read_micro_batch(
    where: str, saved: Any, param_of: Mapping[Any, Tensor], losses: set[str], home: torch.device
) -> MicroBatch:
    keys = {"loss", "largest", "params", "flags"}
    if not isinstance(saved, dict) or set(saved) != keys:
        raise ArgumentError(f"{where}: expected the keys {sorted(keys)}, got {saved!r}.")
    loss, largest, flags = saved["loss"], saved["largest"], saved["flags"]
    if not isinstance(loss, str) or loss not in losses:
        raise ArgumentError(f'{where}["loss"]: expected one of {sorted(losses)}, got {loss!r}.')
    # NaN is what looking at gradients that overflowed may give
    sized = isinstance(largest, float) and (largest >= 0 or math.isnan(largest))
    if largest is not None and not sized:
        raise ArgumentError(f'{where}["largest"]: expected a size or None, got {largest!r}.')
    if not isinstance(flags, list) or not all(type(f) is int and 0 <= f < 2**31 for f in flags):
        raise ArgumentError(f'{where}["flags"]: expected a list of small integers, got {flags!r}.')
    params = saved["params"]
    if not isinstance(params, list) or len(params) != len(flags) or not params:
        raise ArgumentError(f'{where}["params"]: expected one for each flag, got {params!r}.')
    own = [_param(f'{where}["params"]', number, param_of) for number in params]
    return MicroBatch(
        loss,
        torch.full((), any(flags), dtype=torch.bool, device=home),
        None if largest is None else torch.full((), largest, dtype=torch.float64, device=home),
        {
            param: torch.full((), flag, dtype=torch.int32, device=param.device)
            for param, flag in zip(own, flags, strict=True)
        },
    )
