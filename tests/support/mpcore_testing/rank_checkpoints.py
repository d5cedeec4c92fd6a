"""`torch.distributed.checkpoint` on some ranks in one layout, loaded on others in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mpcore
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from mpcore_testing.rank_cases import wrapped
from mpcore_testing.rank_layouts import make_model, state_of, whole

LAYOUTS = ("ddp", "fsdp")
SETTINGS = (
    ("float16", "fused", "AdamW"),
    ("bfloat16", "general", "SGD"),
    ("float32", "fused", "Lion"),
)


def build(layout: str, dtype: str, path: str, inner: str, *, seed: int) -> tuple[nn.Module, Any]:
    """A model of other weights for each seed, the same on each rank."""
    model: Any = make_model(getattr(torch, dtype))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(seed / 8)
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh)
        return model, wrapped(model.named_parameters(), path, inner, ranks=None)
    optimizer = wrapped(model.named_parameters(), path, inner, ranks=mpcore.Ranks())
    return nn.parallel.DistributedDataParallel(model), optimizer


def give_gradients(model: nn.Module, optimizer: Any, seed: int) -> None:
    """The same on each rank, whatever the layout."""
    draw = torch.Generator().manual_seed(seed)
    scale = optimizer.scale(torch.ones(()))
    for param in model.parameters():
        grad = (torch.randn(param.shape, generator=draw) * scale / 64).to(param.dtype)
        if hasattr(param, "placements"):
            grad = distribute_tensor(grad, param.device_mesh, param.placements)
        param.grad = grad


def train(model: nn.Module, optimizer: Any, seeds: Any) -> None:
    for seed in seeds:
        give_gradients(model, optimizer, seed)
        optimizer.step()
        optimizer.zero_grad()


def folder_of(folder: str, layout: str, setting: tuple[str, ...]) -> str:
    return f"{folder}/{layout}-{'-'.join(setting)}"


def save(rank: int, folder: str, layout: str, setting: tuple[str, str, str]) -> None:
    """Saves after three steps, and beside it what one more makes of them."""
    model, optimizer = build(layout, *setting, seed=1)
    train(model, optimizer, range(3))
    weights, states = get_state_dict(model, optimizer)
    where, saved = folder_of(folder, layout, setting), {"model": weights, "optimizer": states}
    if setting is SETTINGS[0]:
        found: Any = dcp.async_save(saved, checkpoint_id=where)
        found.result()
    else:
        dcp.save(saved, checkpoint_id=where)
    now = state_of(model, optimizer)
    train(model, optimizer, [3])
    if rank == 0:
        torch.save((now, state_of(model, optimizer)), f"{where}.pt")
    else:
        state_of(model, optimizer)  # which is collective


def loaded(folder: str, saved: str, layout: str, setting: tuple[str, str, str]) -> Any:
    """What is there after a load, and after one more step."""
    model, optimizer = build(layout, *setting, seed=2)
    train(model, optimizer, [7])
    weights, states = get_state_dict(model, optimizer)
    where = folder_of(folder, saved, setting)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=where)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    give_gradients(model, optimizer, 3)
    now = state_of(model, optimizer) if optimizer.last_step else counted(model, optimizer)
    optimizer.step()
    return now, state_of(model, optimizer)


def counted(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """`state_of` where no step was taken since."""
    params = list(model.parameters())
    return {
        "scale": optimizer.loss_scale,
        "counters": (optimizer.steps, optimizer.skipped_steps),
        "weights": list(map(whole, params)),
        "state": [
            {key: whole(value) for key, value in optimizer.state[param].items()} for param in params
        ],
    }


def torn(folder: str) -> tuple[str, bool]:
    """What loading a save says whose end is missing, and whether all is as before."""
    setting = SETTINGS[0]
    model, optimizer = build("fsdp", *setting, seed=2)
    train(model, optimizer, [7])
    before = counted(model, optimizer)
    weights, states = get_state_dict(model, optimizer)
    where = f"{folder}/torn"
    if distributed.get_rank() == 0:
        source = Path(folder_of(folder, "fsdp", setting))
        Path(where).mkdir()
        for file in source.glob("*.distcp"):
            (Path(where) / file.name).write_bytes(file.read_bytes())
    distributed.barrier()
    try:
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=where)
    except CheckpointException as error:
        message = str(error)
    after = counted(model, optimizer)
    return message, _same(before, after)


def whole_state(rank: int) -> bool:
    """A whole state, as one process saves it, loaded by a sharded optimizer without DCP."""
    setting = SETTINGS[0]
    model, optimizer = build("ddp", *setting, seed=1)
    train(model, optimizer, range(2))
    other, resumed = build("fsdp", *setting, seed=1)
    for mine, its in zip(other.parameters(), model.parameters(), strict=True):
        with torch.no_grad():
            mine.copy_(distribute_tensor(its.detach(), mine.device_mesh, mine.placements))
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, [5])
    train(other, resumed, [5])
    return _same(counted(model, optimizer), counted(other, resumed))


def refused() -> str:
    """A sharded state, loaded by an optimizer of whole parameters without DCP."""
    setting = SETTINGS[0]
    model, optimizer = build("fsdp", *setting, seed=1)
    train(model, optimizer, range(2))
    _, other = build("ddp", *setting, seed=1)
    try:
        other.load_state_dict(optimizer.state_dict())
    except mpcore.ArgumentError as error:
        return str(error)
    return "nothing"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def work(rank: int, folder: str, size: str) -> None:
    distributed.init_process_group(
        "gloo", f"file://{folder}/s{size}", rank=rank, world_size=int(size)
    )
    if size == "2":
        for layout in LAYOUTS:
            for setting in SETTINGS:
                save(rank, folder, layout, setting)
        found: Any = (torn(folder), whole_state(rank), refused())
    else:
        found = [
            (saved, layout, setting, loaded(folder, saved, layout, setting))
            for saved in LAYOUTS
            for layout in LAYOUTS
            for setting in SETTINGS
        ]
    torch.save(found, f"{folder}/size{size}-rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
