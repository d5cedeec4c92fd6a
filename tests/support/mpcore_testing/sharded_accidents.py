"""What happens to sharded parameters between the calls of a step: each runs on every rank."""

from __future__ import annotations

from typing import Any

import mpcore
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from mpcore_testing.rank_cases import SCALE, wrapped
from mpcore_testing.rank_layouts import LAYOUTS, make_model, overflow, whole


def _mesh() -> Any:
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def _param(value: Tensor, mesh: Any, place: Any) -> Any:
    return nn.Parameter(distribute_tensor(value, mesh, [place]))


def _step(optimizer: Any, params: list[Any], value: float = 1.0) -> None:
    scale = optimizer.scale(torch.ones(()))
    for param in params:
        param.grad = torch.full_like(param, value) * scale.to(param.dtype)
    optimizer.step()
    optimizer.zero_grad()


def relaid(rank: int, path: str) -> bool:
    """Another memory format between two steps: the bits of a plain tensor's training."""
    torch.manual_seed(0)
    plain = nn.Parameter(torch.randn(4, 3, 3, 3).half())
    sharded = _param(plain.detach().clone(), _mesh(), Replicate())
    found = []
    for param in (plain, sharded):
        ranks = mpcore.Ranks() if param is plain else None
        optimizer = wrapped([param], path, "AdamW", ranks=ranks)
        _step(optimizer, [param])
        here: Any = param._local_tensor if param is sharded else param
        here.data = here.detach().contiguous(memory_format=torch.channels_last)
        _step(optimizer, [param], 2.0)
        found.append((whole(param), whole(optimizer.state[param]["master"])))
    return all(map(torch.equal, *found))


def overflown_since(rank: int, way: str) -> tuple[bool, bool]:
    """An infinity that one rank adds to what it holds, after a look: whether skipped, and whole."""
    torch.manual_seed(0)
    model = nn.Linear(4, 6).half()
    fully_shard(model, mesh=_mesh())
    optimizer = wrapped(model.named_parameters(), "fused", "SGD", ranks=None)
    optimizer.backward(model(torch.ones(2, 4).half()).float().sum())
    if way == "clip":
        optimizer.clip_grad_norm_(1.0)
    else:
        optimizer.unscale_()
    grad: Any = model.weight.grad
    if rank == 1:
        grad._local_tensor[0, 0] = torch.inf
    optimizer.step()
    masters = [optimizer.state[param]["master"] for param in model.parameters()]
    return optimizer.last_step.skipped, all(bool(whole(m).isfinite().all()) for m in masters)


def single_number(rank: int) -> tuple[str, bool]:
    """A parameter of no dimensions: what a load makes of its step count, and of the next step."""
    mesh = _mesh()
    runs = []
    for loads in (False, True):
        param = _param(torch.ones(()).half(), mesh, Replicate())
        optimizer = wrapped([param], "fused", "AdamW", ranks=None)
        _step(optimizer, [param])
        if loads:
            optimizer.load_state_dict(optimizer.state_dict())
        _step(optimizer, [param], 2.0)
        runs.append(whole(optimizer.state[param]["master"]))
    return type(optimizer.state[param]["step"]).__name__, torch.equal(*runs)


def master_edited(rank: int, path: str) -> float:
    """A master that somebody doubles: what the next step, over zeros, makes of it."""
    param = _param(torch.ones(5, 2).half(), _mesh(), Shard(0))
    optimizer = wrapped([param], path, "SGD", ranks=None)
    _step(optimizer, [param], 0.0)
    _step(optimizer, [param], 0.0)
    optimizer.state[param]["master"].mul_(2.0)
    _step(optimizer, [param], 0.0)
    masters, weights = whole(optimizer.state[param]["master"]), whole(param)
    return float(masters.min() + masters.max() + weights.max())


def first_edit(rank: int, path: str) -> tuple[int, float]:
    """A row that one rank holds, written to after the masters were made, before the first step."""
    param = _param(torch.ones(4, 2), _mesh(), Shard(0))
    optimizer = wrapped([param], path, "SGD", ranks=None)
    model = nn.Module()
    model.weight = param
    mpcore.cast_model(model, torch.float16, optimizer)
    if rank == 1:
        param._local_tensor[0] = 3.0
    _step(optimizer, [param], 0.0)
    return optimizer.steps, float(whole(optimizer.state[param]["master"]).sum())


def computed(rank: int, way: str) -> float:
    """A loss scale that is computed from the largest gradient of all shards."""
    model = nn.Linear(4, 1).half()  # one row: a rank has none
    fully_shard(model, mesh=_mesh())
    scaling = mpcore.HeadroomLossScale(SCALE, spare_bits=2)
    optimizer = wrapped(model.named_parameters(), "fused", "SGD", ranks=None, scaling=scaling)
    optimizer.backward(model(torch.ones(1, 4).half()).float().sum())
    if way == "clip":
        optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    return optimizer.loss_scale


def told(rank: int, what: str) -> str:
    """What is said of state over another mesh, and of a group that is too small."""
    mesh = _mesh()
    turned = DeviceMesh("cpu", list(reversed(range(distributed.get_world_size()))))
    alone = [distributed.new_group([member]) for member in range(mesh.size())][rank]
    param = _param(torch.ones(4, 2).half(), mesh, Shard(0))
    try:
        if what == "group":
            wrapped([param], "fused", "SGD", ranks=mpcore.Ranks(alone))
        optimizer = wrapped([param], "fused", "SGD", ranks=None)
        _step(optimizer, [param])
        if what == "state":
            state = optimizer.state_dict()
            master = state["state"][0]["master"].full_tensor()
            state["state"][0]["master"] = distribute_tensor(master, turned, [Shard(0)])
            optimizer.load_state_dict(state)
        elif what == "gradient":
            param.grad = distribute_tensor(torch.ones(4, 2).half(), turned, [Shard(0)])
            optimizer.scale(torch.ones(()))
            optimizer.step()
    except mpcore.ArgumentError as error:
        return str(error)
    return "nothing"


def watched(rank: int, bad: bool) -> dict[str, Any]:
    """A Monitor over uneven shards: its reading, and what the whole is; `bad`: rank 1 overflows."""
    model = make_model(torch.float16)
    LAYOUTS["fsdp"](model)
    optimizer = wrapped(model.named_parameters(), "fused", "AdamW", ranks=None)
    # nobody has to watch on all ranks
    monitor = mpcore.Monitor(optimizer, model, every=1) if rank == 1 or not bad else None
    for step in range(2):
        optimizer.backward(model(torch.ones(2, 4).half()).float().square().mean())
        if bad and step == 1 and rank == 1:
            overflow(model)
        grads = [whole(param.grad) for param in model.parameters()]
        norm = float(optimizer.clip_grad_norm_(1.0))
        optimizer.step()
        optimizer.zero_grad()
    reading: Any = None if monitor is None else monitor.reading
    return {
        "reading": None if reading is None else reading.to_dict(),
        "norm": norm,
        "values": sum(int(grad.count_nonzero()) for grad in grads),
    }


def apart(rank: int) -> tuple[list[float], list[tuple[bool, float, float]]]:
    """Copies of tensor parallel ranks with other last digits, as other thread counts make them.

    Returns this rank's master of the norm's weight, and skips, scales, norms.
    """
    model = make_model(torch.float16)
    LAYOUTS["tensor"](model)
    block: Any = model[1]
    optimizer = wrapped(model.named_parameters(), "fused", "SGD", ranks=None)
    found = []
    for step in range(3):
        optimizer.backward(model(torch.ones(2, 4).half()).float().square().mean())
        block.norm.weight.grad.mul_(1.0 + 2.0**-7 * rank)
        if step == 1 and rank == 1:
            overflow(model)
        norm = float(optimizer.clip_grad_norm_(0.5))
        optimizer.step()
        optimizer.zero_grad()
        found.append((optimizer.last_step.skipped, optimizer.loss_scale, norm))
    return optimizer.state[block.norm.weight]["master"].tolist(), found
