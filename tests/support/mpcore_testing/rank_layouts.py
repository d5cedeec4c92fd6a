"""A small model sharded in each layout of torch.distributed, trained; what one process replays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import mpcore
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from mpcore_testing.rank_cases import SCALE, wrapped

STEPS = 4
BAD = 1  # the step whose gradients overflow


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        widened: Tensor = nn.functional.gelu(self.up(self.norm(x)))
        lowered: Tensor = self.down(widened)
        return x + lowered


def make_model(dtype: torch.dtype) -> nn.Sequential:
    """Layers of five and three rows: fewer than ranks, and not a multiple of them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), Block(), nn.Linear(6, 5), nn.Linear(5, 3)).to(dtype)


def _fsdp(model: Any, mesh: Any) -> None:
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)


def _tensor_parallel(model: Any, mesh: Any, *, sequence: bool) -> None:
    """With `sequence`, the gradient of the norm is a sum that ranks have yet to add up."""
    block: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if sequence:
        block = {
            "norm": SequenceParallel(sequence_dim=0),
            "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Shard(0)),
        }
        ends: dict[str, Any] = {
            "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
            "2": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
        }
        parallelize_module(model, mesh, ends)
    parallelize_module(model[1], mesh, block)


def _two_dimensions(model: Any, *, sequence: bool) -> None:
    size = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
    _tensor_parallel(model, mesh["tensor"], sequence=sequence)
    _fsdp(model, mesh["data"])


def _line() -> Any:
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def _square() -> Any:
    size = distributed.get_world_size()
    return init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))


LAYOUTS: dict[str, Callable[[Any], None]] = {
    "fsdp": lambda model: _fsdp(model, _line()),
    "hsdp": lambda model: _fsdp(model, _square()),
    "tensor": lambda model: _tensor_parallel(model, _line(), sequence=False),
    "sequence": lambda model: _tensor_parallel(model, _line(), sequence=True),
    "2-D": lambda model: _two_dimensions(model, sequence=False),
    "2-D sequence": lambda model: _two_dimensions(model, sequence=True),
}


def whole(tensor: Any) -> Tensor:
    """Returns a copy of all of a tensor, put together from all ranks."""
    tensor = tensor.detach()
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.clone()


def data_of(rank: int, layout: str) -> int:
    """Which batch a rank has: ranks of one tensor parallel group have the same."""
    if layout.startswith("2-D"):
        return rank // 2
    return 0 if layout in ("tensor", "sequence") else rank


def trained(
    rank: int, layout: str, dtype: str, path: str, inner: str, way: str, bad: int
) -> dict[str, Any]:
    """Trains; returns the gradients that ranks have reduced, and what became of them."""
    # ranks of one tensor parallel group compute copies; with other threads these would differ
    torch.set_num_threads(1 + rank % 2 if layout in ("fsdp", "hsdp") else 1)
    model = make_model(getattr(torch, dtype))
    LAYOUTS[layout](model)
    setting = (dtype, path, inner, way)
    return course_of(model, data_of(rank, layout), setting, overflows=rank == bad)


def course_of(
    model: Any, data: int, setting: tuple[str, str, str, str], *, overflows: bool
) -> dict[str, Any]:
    """Trains a sharded model on batches of its rank; what `trained` returns."""
    dtype, path, inner, way = setting
    optimizer = wrapped(model.named_parameters(), path, inner, ranks=None)
    found: list[dict[str, Any]] = []
    grads: list[Tensor] = []
    for step in range(STEPS):
        x = (torch.arange(32.0).view(8, 4) / 32 + step) * (1 + data)

        def evaluate(step: int = step, x: Tensor = x) -> Tensor:
            loss = model(x.to(getattr(torch, dtype))).float().square().mean()
            optimizer.backward(loss)
            if step == BAD and overflows:
                overflow(model)
            grads[:] = [whole(p.grad) for p in model.parameters()]
            return loss.detach()

        norm = take_step(optimizer, model, evaluate, way)
        found.append({"grads": list(grads), "norm": norm, **state_of(model, optimizer)})
    return {"path": str(optimizer.path[0]), "steps": found}


def overflow(model: Any) -> None:
    """Makes an element infinite that this rank holds, of a DTensor if there is one."""
    for param in sorted(model.parameters(), key=lambda param: not hasattr(param, "to_local")):
        grad: Any = param.grad
        here = grad.to_local() if hasattr(grad, "to_local") else grad
        if here is not None and here.numel():
            here.view(-1)[0] = torch.inf
            return


def take_step(optimizer: Any, model: Any, evaluate: Callable[[], Any], way: str) -> Any:
    """A step in one of several ways; returns the norm if it clips."""
    norm = None
    if way == "closure":
        optimizer.step(evaluate)
    else:
        evaluate()
        if way == "accumulate":
            optimizer.accumulate()
        if way in ("unscale", "both"):
            optimizer.unscale_()
            for param in model.parameters():
                param.grad.mul_(0.5)
        if way in ("clip", "both"):
            norm = float(optimizer.clip_grad_norm_(0.05))
        optimizer.step()
    optimizer.zero_grad()
    return norm


def state_of(model: Any, optimizer: Any) -> dict[str, Any]:
    """What has to be equal in bits."""
    params = list(model.parameters())
    states = [optimizer.state[param] for param in params]
    return {
        "skipped": optimizer.last_step.skipped,
        "scale": optimizer.loss_scale,
        "counters": (optimizer.steps, optimizer.skipped_steps),
        "weights": list(map(whole, params)),
        "state": [
            {name: whole(value) for name, value in state.items() if value is not None}
            for state in states
        ],
    }


def replayed(found: dict[str, Any], dtype: str, path: str, inner: str, way: str) -> dict[str, Any]:
    """The same in one process, from the gradients that ranks have reduced."""
    model = make_model(getattr(torch, dtype))
    optimizer = wrapped(model.named_parameters(), path, inner, ranks=None)
    again = []
    for step in found["steps"]:

        def evaluate(step: dict[str, Any] = step) -> Tensor:
            loss: Tensor = optimizer.scale(torch.ones(()))
            for param, grad in zip(model.parameters(), step["grads"], strict=True):
                param.grad = grad.clone()
            return loss

        norm = take_step(optimizer, model, evaluate, way)
        again.append({"grads": step["grads"], "norm": norm, **state_of(model, optimizer)})
    return {"path": str(optimizer.path[0]), "steps": again}


def parted(rank: int, path: str, clips: bool, bad: int) -> list[dict[str, Any]]:
    """Two stages of a pipeline, each sharded over ranks of its own; the second has the loss."""
    size = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("stage", "data"))
    stage = rank // (size // 2)
    model = nn.Sequential(OrderedDict({f"stage{stage}": nn.Linear(5 - stage, 3).half()}))
    fully_shard(model, mesh=mesh["data"])
    ranks = mpcore.Ranks(replicas={"*": None}) if path == "fused" else mpcore.Ranks()
    optimizer = wrapped(model.named_parameters(), path, ranks=ranks)
    found = []
    for step in range(3):
        if stage == 1:
            optimizer.scale(torch.ones(()))
        for param in model.parameters():
            param.grad = (param.detach() * (0.5 * optimizer.loss_scale)).to(param.dtype)
        if step == BAD and rank == bad:
            overflow(model)
        grads = [whole(param.grad) for param in model.parameters()]
        norm = float(optimizer.clip_grad_norm_(0.25)) if clips else None
        optimizer.step()
        optimizer.zero_grad()
        found.append({"grads": grads, "norm": norm, **state_of(model, optimizer)})
    return found


def flat(rank: int, clips: bool, original: bool, bad: int) -> list[dict[str, Any]]:
    """FullyShardedDataParallel: parameters that are a rank's pieces of one flat tensor."""
    torch.manual_seed(0)
    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).half(),
        device_id=torch.device("cpu"),
        use_orig_params=original,
    )
    ranks = mpcore.Ranks(replicas={"*": None})
    optimizer = wrapped(model.named_parameters(), "fused", "AdamW", ranks=ranks)
    found = []
    for step in range(3):
        optimizer.backward(model((torch.ones(2, 4) * (rank + 1)).half()).float().square().mean())
        grads = [param.grad.clone() for param in model.parameters() if param.grad is not None]
        if step == BAD and rank == bad:
            overflow(model)
        norm = float(optimizer.clip_grad_norm_(0.25)) if clips else None
        optimizer.step()
        optimizer.zero_grad()
        found.append(
            {
                "squares": sum(float(g.double().square().sum()) for g in grads) / SCALE**2,
                "norm": norm,
                "skipped": optimizer.last_step.skipped,
                "scale": optimizer.loss_scale,
            }
        )
    return found


def muon(rank: int) -> float:
    """Muon over rows, chained with AdamW: how far its update is from that over the whole matrix."""
    torch.manual_seed(0)
    plain, sharded = nn.Linear(48, 64).half(), nn.Linear(48, 64).half()
    sharded.load_state_dict(plain.state_dict())
    fully_shard(sharded, mesh=_line())
    before = whole(plain.weight).float()
    grad = torch.randn(64, 48).half()
    for model in (plain, sharded):
        inner = mpcore.optim.ChainedOptimizer(
            torch.optim.Muon([model.weight], lr=1.0, weight_decay=0.0),
            torch.optim.AdamW([model.bias]),
        )
        ranks = None if model is sharded else mpcore.Ranks()
        optimizer = mpcore.MixedPrecisionOptimizer(inner, mpcore.NoLossScale(), ranks=ranks)
        assert [path.path for path in optimizer.path] == ["general", "fused"]
        model.weight.grad, model.bias.grad = map(torch.zeros_like, (model.weight, model.bias))
        model.weight.grad.copy_(
            torch.distributed.tensor.distribute_tensor(grad, _line(), [Shard(0)])
            if model is sharded
            else grad
        )
        optimizer.step()
    assert torch.equal(whole(sharded.bias), plain.bias)
    moved, expected = whole(sharded.weight).float() - before, whole(plain.weight).float() - before
    return float((moved - expected).norm() / expected.norm())


def cast_later(rank: int) -> dict[str, Any]:
    """float32 weights that are sharded first and cast then; norms are groups of their own."""
    model = make_model(torch.float32)
    original = [whole(param) for param in model.parameters()]
    mesh = _line()
    for layer in (model[1].norm, *model, model):  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    optimizer = wrapped(model.named_parameters(), "fused", "AdamW", ranks=None)
    before = list(model.parameters())
    mpcore.cast_model(model, torch.float16, optimizer)
    states = [optimizer.state[param] for param in before]
    masters = [
        whole(state.get("master", param)) for state, param in zip(states, before, strict=True)
    ]
    optimizer.backward(model(torch.ones(2, 4)).float().square().mean())
    optimizer.step()
    return {
        "same": all(one is other for one, other in zip(before, model.parameters(), strict=True)),
        "kept": all(map(torch.equal, masters, original)),
        "dtypes": {str(param.dtype) for param in model.parameters()},
        "steps": optimizer.steps,
        "stale": optimizer.check_masters(),
    }


def driven(rank: int, bad: int) -> list[tuple[bool, float, int]]:
    """A GradScaler around torch's own optimizer over a 2-D mesh: skips, scales, collectives."""
    model = make_model(torch.float32)
    LAYOUTS["2-D"](model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = mpcore.GradScaler("cpu", init_scale=SCALE)
    own, calls = distributed.all_reduce, 0

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return own(*arguments, **options)

    found = []
    for step in range(3):
        scaler.scale(model(torch.ones(2, 4)).square().mean()).backward()
        if step == BAD and rank == bad:
            overflow(model)
        before, distributed.all_reduce = calls, counting
        scaler.step(optimizer)
        distributed.all_reduce = own
        scaler.update()
        optimizer.zero_grad()
        found.append((scaler.last_step.skipped, scaler.get_scale(), calls - before))
    return found
