"""Ranks whose masters are split, beside the same ones with float32 masters."""

from __future__ import annotations

import copy
from typing import Any

import mpcore
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mpcore_testing.bits import same_bits
from mpcore_testing.rank_cases import wrapped
from mpcore_testing.rank_checkpoints import give_gradients, train
from mpcore_testing.rank_layouts import LAYOUTS, make_model, overflow, whole

PATHS = ("fused", "general")
DTYPES = ("float16", "bfloat16")


def _sharded(masters: str, dtype: str, path: str, layout: str = "fsdp") -> tuple[Any, Any]:
    model = make_model(getattr(torch, dtype))
    LAYOUTS[layout](model)
    options = {"ranks": None, "masters": masters}
    if path != "mixed":  # of a group that is not told to be fused the reference makes a general one
        options["backend"] = "reference"
    return model, wrapped(model.named_parameters(), path, "AdamW", **options)


def _states(model: Any, optimizer: Any) -> list[dict[str, Any]]:
    """Returns weights and float32 state, whole."""
    states = [optimizer.float32_state(param) for param in model.parameters()]
    return [{name: whole(value) for name, value in state.items()} for state in states]


def same_as_float32(
    rank: int, layout: str, dtype: str, path: str, bad: int
) -> tuple[bool, set[str], list[bool]]:
    """Whether split masters have the bits of float32 ones, what lies beside weights, skips.

    Rows do not divide by the ranks; of a layer of three rows one rank has one.
    """
    skips = []
    split, theirs = (_sharded(masters, dtype, path, layout) for masters in ("split", "float32"))
    same = True
    for seed in range(4):
        for model, optimizer in (split, theirs):
            give_gradients(model, optimizer, seed)
            if seed in (1, 2) and rank == bad:  # one rank overflows, with a clip and without one
                overflow(model)
            if seed % 2:
                optimizer.clip_grad_norm_(0.1)
            optimizer.step()
            optimizer.zero_grad()
        skips.append(split[1].last_step.skipped)
        same = same and same_bits(_states(*split), _states(*theirs))
    model, optimizer = split
    beside = [optimizer.state[param]["remainder"] for param in model.parameters()]
    kinds = {f"{type(one).__name__} {one.dtype}" for one in beside}
    return same, kinds, skips


def checkpoints(rank: int, folder: str, dtype: str, path: str) -> tuple[bool, bool, bool]:
    """A split run into float32 masters by torch.distributed.checkpoint, and back, and compact."""
    model, optimizer = _sharded("split", dtype, path)
    train(model, optimizer, range(3))
    now = _states(model, optimizer)
    weights, states = get_state_dict(model, optimizer)
    where = f"{folder}/{dtype}-{path}"
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=where)
    other, theirs = _sharded("float32", dtype, path)
    train(other, theirs, [7])
    weights, states = get_state_dict(other, theirs)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=where)
    set_state_dict(other, theirs, model_state_dict=weights, optim_state_dict=states)
    into_float32 = same_bits(_states(other, theirs), now)
    again, ours = _sharded("split", dtype, path)
    again.load_state_dict(copy.deepcopy(other.state_dict()))
    ours.load_state_dict(theirs.state_dict())
    for one in ((model, optimizer), (other, theirs), (again, ours)):
        train(*one, [4])
    then = _states(model, optimizer)
    if rank == 0:  # for other ranks: see `resumed`
        torch.save((now, then), f"{where}.pt")
    back = same_bits(_states(again, ours), _states(model, optimizer)) and same_bits(
        _states(other, theirs), _states(model, optimizer)
    )
    last, compact = _sharded("split", dtype, path)
    last.load_state_dict(copy.deepcopy(model.state_dict()))
    compact.load_state_dict(copy.deepcopy(optimizer.state_dict(compact=True)))
    return into_float32, back, same_bits(_states(last, compact), _states(model, optimizer))


def resumed(rank: int, folder: str, dtype: str, path: str, masters: str) -> tuple[bool, bool]:
    """What two ranks with split masters saved, on three: whether it came back, and a step more."""
    model, optimizer = _sharded(masters, dtype, path)
    train(model, optimizer, [7])
    weights, states = get_state_dict(model, optimizer)
    where = f"{folder}/{dtype}-{path}"
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=where)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    found = [_states(model, optimizer)]
    train(model, optimizer, [4])
    found.append(_states(model, optimizer))
    now, then = map(same_bits, found, torch.load(f"{where}.pt"))
    return now, then


def edited(rank: int, path: str) -> tuple[bool, bool]:
    """A write to what one rank holds counts, and the remainder stays."""
    model, optimizer = _sharded("split", "bfloat16", path)
    train(model, optimizer, range(2))
    weight: Any = next(model.parameters())
    remainder: Any = optimizer.state[weight]["remainder"]
    before = remainder._local_tensor.clone()  # gloo and NCCL send no int16
    if rank == 0:
        weight._local_tensor.zero_()
    value = whole(optimizer.float32_state(weight)["master"])
    rows = weight._local_tensor.shape[0]
    stays = torch.equal(before, optimizer.state[weight]["remainder"]._local_tensor)
    return bool((value[:rows].abs() < 2.0**-100).all()) or rank != 0, stays


def refused(rank: int) -> str:
    """What ranks are told whose originals differ in digits that weights do not have."""
    model: Any = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0 + rank * 2.0**-20)
    optimizer = wrapped(model.parameters(), "general", masters="split", backend="reference")
    mpcore.cast_model(model, torch.bfloat16, optimizer)
    optimizer.backward(model(torch.ones(1, 4).bfloat16()).float().sum())
    try:
        optimizer.step()
    except mpcore.StageError as error:
        return str(error)
    return "stepped"


def cases_of(folder: str) -> list[tuple[Any, ...]]:
    """All cases of two ranks."""
    layouts = ("fsdp", "tensor")
    return [
        *((same_as_float32, one, d, p, 1) for one in layouts for d in DTYPES for p in PATHS),
        (same_as_float32, "fsdp", "float16", "mixed", 1),
        (same_as_float32, "fsdp", "bfloat16", "mixed", 0),
        *((checkpoints, folder, d, p) for d in DTYPES for p in PATHS),
        (checkpoints, folder, "float16", "mixed"),
        *((edited, path) for path in PATHS),
        (refused,),
    ]


def cases_after(folder: str) -> list[tuple[Any, ...]]:
    """Those of three ranks, after two have saved."""
    return [
        (resumed, folder, "float16", "fused", "float32"),
        (resumed, folder, "bfloat16", "general", "float32"),
        (resumed, folder, "float16", "mixed", "float32"),
        (resumed, folder, "bfloat16", "fused", "split"),
    ]


def work(rank: int, folder: str, size: str) -> None:
    """Runs all cases on one rank."""
    distributed.init_process_group(
        "gloo", f"file://{folder}/s{size}", rank=rank, world_size=int(size)
    )
    cases = cases_of(folder) if size == "2" else cases_after(folder)
    found = [(case.__name__, o, case(rank, *o)) for case, *o in cases]
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
