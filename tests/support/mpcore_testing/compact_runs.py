"""Ranks that keep moments compactly, or no masters, beside one process that has all of it."""

from __future__ import annotations

import copy
from typing import Any

import mpcore
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mpcore_testing.bits import same_bits
from mpcore_testing.rank_layouts import overflow, whole

WAYS = (("float32", "bfloat16"), ("split", "int8"), ("none", "int8"), ("none", "bfloat16"))


def make_model() -> Any:
    """Layers of five and three rows, which ranks share unequally; long rows and short ones."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 5), nn.Linear(5, 3)).bfloat16()


def _line() -> Any:
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def _wrapped(model: Any, masters: Any, moments: Any) -> Any:
    return mpcore.MixedPrecisionOptimizer(
        torch.optim.AdamW(model.named_parameters(), lr=1e-2),
        mpcore.StaticLossScale(2.0**4),
        backend="reference",
        masters=masters,
        moments=moments,
    )


def _sharded(masters: str, moments: str) -> tuple[Any, Any]:
    model = make_model()
    for layer in (*model, model):
        fully_shard(layer, mesh=_line())
    return model, _wrapped(model, masters, moments)


def _give(model: Any, optimizer: Any, seed: int) -> None:
    scale = float(optimizer.scale(torch.ones(())))
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)
        if hasattr(param, "placements"):
            grad = distribute_tensor(grad, param.device_mesh, param.placements)
        param.grad = grad


def _step(model: Any, optimizer: Any, seed: int, *, bad: bool = False) -> None:
    _give(model, optimizer, seed)
    if bad:
        overflow(model)
    optimizer.step()
    optimizer.zero_grad()


def _whole(model: Any, optimizer: Any) -> list[Any]:
    """Returns weights, masters and moments, whole: what lies there in 8 bits no rank sends."""
    states = [optimizer.float32_state(param) for param in model.parameters()]
    return [
        [whole(param) for param in model.parameters()],
        [{name: whole(value) for name, value in state.items()} for state in states],
    ]


def as_one_process(rank: int, masters: str, moments: str) -> tuple[bool, set[str], list[bool]]:
    """Whether shards have the bits of the whole, what lies there, and skips."""
    model, optimizer = _sharded(masters, moments)
    plain = make_model()
    theirs = _wrapped(plain, masters, moments)
    skips, same = [], True
    for seed in range(4):
        _step(model, optimizer, seed, bad=seed == 2 and rank == 1)
        if seed != 2:  # which all ranks skip: it draws nothing
            _step(plain, theirs, seed)
        skips.append(optimizer.last_step.skipped)
        same = same and same_bits(_whole(model, optimizer), _whole(plain, theirs))
    state = optimizer.state[model[0].weight]
    tensors = [value for name, value in state.items() if name.startswith("exp_avg")]
    return same, {f"{type(one).__name__} {one.dtype}" for one in tensors}, skips


def of_one_process(rank: int, masters: str, moments: str) -> bool:
    """What one process saved as it lies, loaded into shards: whether a step more has its bits."""
    plain = make_model()
    theirs = _wrapped(plain, masters, moments)
    for seed in range(2):
        _step(plain, theirs, seed)
    model, optimizer = _sharded(masters, moments)
    optimizer.load_state_dict(theirs.state_dict(compact=True))
    with torch.no_grad():
        for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
            mine.copy_(distribute_tensor(its.detach(), mine.device_mesh, mine.placements))
    for one in ((model, optimizer), (plain, theirs)):
        _step(*one, 4)
    return same_bits(_whole(model, optimizer), _whole(plain, theirs))


def checkpoints(rank: int, folder: str, masters: str, moments: str) -> tuple[bool, bool]:
    """Through torch.distributed.checkpoint, and compact: whether a step more has the same bits."""
    model, optimizer = _sharded(masters, moments)
    for seed in range(2):
        _step(model, optimizer, seed)
    weights, states = get_state_dict(model, optimizer)
    where = f"{folder}/{masters}-{moments}"
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=where)
    other, theirs = _sharded(masters, moments)
    _step(other, theirs, 7)
    weights, states = get_state_dict(other, theirs)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=where)
    set_state_dict(other, theirs, model_state_dict=weights, optim_state_dict=states)
    last, compact = _sharded(masters, moments)
    last.load_state_dict(copy.deepcopy(model.state_dict()))
    compact.load_state_dict(copy.deepcopy(optimizer.state_dict(compact=True)))
    for one in ((model, optimizer), (other, theirs), (last, compact)):
        _step(*one, 4)
    now = _whole(model, optimizer)
    if rank == 0:
        torch.save(now, f"{where}.pt")
    return same_bits(_whole(other, theirs), now), same_bits(_whole(last, compact), now)


def resumed(rank: int, folder: str, masters: str, moments: str) -> bool:
    """What two ranks saved, on three: whether a step more has the same bits."""
    model, optimizer = _sharded(masters, moments)
    _step(model, optimizer, 7)
    weights, states = get_state_dict(model, optimizer)
    where = f"{folder}/{masters}-{moments}"
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=where)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    _step(model, optimizer, 4)
    return same_bits(_whole(model, optimizer), torch.load(f"{where}.pt"))


def columns(rank: int) -> tuple[str, bool, str]:
    """Shards of dimension 1 keep bfloat16 moments, draw the same twice, and refuse codes."""
    found = []
    whole_weight = nn.Parameter(torch.ones(4, 1024).bfloat16())
    theirs = mpcore.MixedPrecisionOptimizer(
        torch.optim.AdamW([whole_weight]), backend="reference", moments="int8"
    )
    whole_weight.grad = torch.ones_like(whole_weight)
    theirs.scale(torch.ones(()))
    theirs.step()
    for _ in range(2):
        values = torch.arange(4 * 1024.0).view(4, 1024).bfloat16() / 1024
        weight = nn.Parameter(distribute_tensor(values, _line(), [Shard(1)]))
        inner = torch.optim.AdamW([weight], lr=1e-2)
        optimizer = mpcore.MixedPrecisionOptimizer(
            inner, mpcore.NoLossScale(), backend="reference", moments="int8"
        )
        weight.grad = distribute_tensor(torch.ones_like(values), _line(), [Shard(1)])
        optimizer.step()
        moment: Any = optimizer.state[weight]["exp_avg"]
        assert isinstance(moment, DTensor)
        found.append(moment.to_local())
    try:
        optimizer.load_state_dict(theirs.state_dict(compact=True))
    except mpcore.ArgumentError as error:
        return str(found[0].dtype), torch.equal(*found), str(error)
    return str(found[0].dtype), torch.equal(*found), "loaded"


def work(rank: int, folder: str, size: str) -> None:
    """Runs all cases on one rank."""
    distributed.init_process_group(
        "gloo", f"file://{folder}/s{size}", rank=rank, world_size=int(size)
    )
    if size == "2":
        cases: list[Any] = [(as_one_process, *way) for way in WAYS]
        cases += [(of_one_process, *way) for way in WAYS]
        cases += [(checkpoints, folder, *way) for way in WAYS]
        cases.append((columns,))
    else:
        cases = [(resumed, folder, *way) for way in WAYS]
    found = [(case.__name__, o, case(rank, *o)) for case, *o in cases]
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
