"""What ranks that act as one do, case by case: each runs on every rank and returns what it saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpcore
import torch
from torch import distributed, nn

SCALE = 2.0**6
#: "mixed": every other parameter in a group whose options keep it from being fused
PATHS = ("fused", "general", "mixed")
INNER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=2.0**-6),
    "SGD": lambda params: torch.optim.SGD(params, lr=2.0**-6, momentum=0.5),
    "Lion": lambda params: mpcore.optim.Lion(params, lr=2.0**-6),
}


def wrapped(params: Any, path: str, inner: str = "SGD", **options: Any) -> Any:
    scaling = options.pop("scaling", mpcore.DynamicLossScale(SCALE, growth_interval=2))
    options.setdefault("ranks", mpcore.Ranks())
    if path == "mixed":
        params = list(params)
        general = {"params": params[1::2], "foreach": False}
        optimizer = INNER[inner]([{"params": params[::2]}, general])
        wrapper = mpcore.MixedPrecisionOptimizer(optimizer, scaling, **options)
        assert [path.path for path in wrapper.path] == ["fused", "general"]
        return wrapper
    return mpcore.MixedPrecisionOptimizer(INNER[inner](params), scaling, path=path, **options)


def values(sizes: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float16) -> list[Any]:
    """Parameters whose gradients `pass_over` makes."""
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.rand(n, generator=draw).to(dtype)) for n in sizes]


def pass_over(optimizer: Any, params: list[Any], factor: float, bad: bool = False) -> None:
    """A backward pass whose gradients are `factor` times the weights; `bad`: one is infinite."""
    optimizer.backward(
        sum((p.float().square().sum() / 2 for p in params), torch.zeros(())) * factor
    )
    if bad:
        params[-1].grad[0] = torch.inf  # after what ranks exchange among themselves


def seen(optimizer: Any, params: list[Any]) -> dict[str, Any]:
    result = optimizer.last_step
    return {
        "skipped": result.skipped,
        "norm": result.grad_norm,
        "scale": optimizer.loss_scale,
        "counters": (optimizer.steps, optimizer.skipped_steps),
        "weights": [p.detach().float().tolist() for p in params],
        "masters": [optimizer.state[p]["master"].tolist() for p in params],
    }


def copies(rank: int, path: str, inner: str, dtype: str, clips: bool, bad: int) -> Any:
    """Equal parameters and gradients, as behind an all-reduce; one rank's overflows afterwards."""
    params = values((5, 3), seed=0, dtype=getattr(torch, dtype))
    optimizer = wrapped(params, path, inner)
    found = []
    for step in range(5):
        pass_over(optimizer, params, 0.5, bad=step in (0, 3) and rank == bad)
        if clips:
            optimizer.clip_grad_norm_(0.25)
        optimizer.step()
        optimizer.zero_grad()
        found.append(seen(optimizer, params))
    return found


def stages(rank: int, path: str, clips: bool, bad: int) -> Any:
    """Stages of a pipeline: parameters of their own; only the last one has the loss."""
    params = values(((5, 3), (4,), (6, 2, 1))[rank], seed=rank)
    optimizer = wrapped(params, path)
    found = []
    for step in range(4):
        if rank == 0:  # its gradients come from the next stage, which has scaled the loss
            for param in params:
                param.grad = param.detach() * (0.5 * optimizer.loss_scale)
            if bad == 0 and step == 1:
                params[0].grad[0] = torch.inf
        else:
            pass_over(optimizer, params, 0.5, bad=step == 1 and rank == bad)
        if clips:
            optimizer.clip_grad_norm_(0.25)
        optimizer.step()
        optimizer.zero_grad()
        found.append(seen(optimizer, params))
    return found


def experts(rank: int, path: str, clips: bool, bad: int) -> Any:
    """A layer that all ranks have, and an expert each; one expert overflows in step 1."""
    shared, expert = values((5,), seed=0), values((4 + rank,), seed=1 + rank)
    named = [("shared.weight", shared[0]), ("experts.0.weight", expert[0])]
    ranks = mpcore.Ranks(replicas={"experts.*": None})
    optimizer = wrapped(named, path, ranks=ranks)
    found = []
    for step in range(3):
        pass_over(optimizer, [*shared, *expert], 0.5, bad=step == 1 and rank == bad)
        if clips:
            optimizer.clip_grad_norm_(0.25)
        optimizer.step()
        optimizer.zero_grad()
        found.append(seen(optimizer, [*shared, *expert]))
    return found


def idle(rank: int, path: str, clips: bool, bad: int) -> Any:
    """Rank 0 has no gradient in step 1, nobody has one in step 2."""
    params = values((4, 2 + rank), seed=rank)
    optimizer = wrapped(params, path)
    found = []
    for step in range(4):
        if step == 0 or step == 3 or (step == 1 and rank > 0):
            pass_over(optimizer, params, 0.5, bad=step == 1 and rank == bad)
        else:
            optimizer.scale(torch.zeros(()))
        if clips:
            optimizer.clip_grad_norm_(0.25)
        optimizer.step()
        optimizer.zero_grad()
        found.append((optimizer.loss_scale, optimizer.steps, optimizer.skipped_steps))
    return found


def summed(rank: int, path: str, told: bool, synced: bool) -> Any:
    """DistributedDataParallel, `no_sync` in all passes but the last, sums in float32."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    options = {} if told else {"ranks": None}
    scaling = mpcore.StaticLossScale(SCALE)
    optimizer = wrapped(model.parameters(), path, scaling=scaling, **options)
    mpcore.cast_model(model, torch.float16, optimizer)
    ddp = nn.parallel.DistributedDataParallel(model)
    for micro_batch in range(4):
        x = torch.full((2, 4), float(rank + 1) * (micro_batch + 1) / 8)
        if synced and micro_batch == 3:
            optimizer.backward(ddp(x).float().mean() / 4)
        else:
            with ddp.no_sync():
                optimizer.backward(ddp(x).float().mean() / 4)
        optimizer.accumulate()
    optimizer.step()
    return seen(optimizer, list(model.parameters()))


def headroom(rank: int, path: str) -> Any:
    """The scale is computed from the largest gradient of all ranks."""
    params = values((4, 2 + rank), seed=rank)
    optimizer = wrapped(params, path, scaling=mpcore.HeadroomLossScale(SCALE, spare_bits=2))
    pass_over(optimizer, params, 2.0 ** (-2 * rank))
    largest = max(float(p.grad.abs().max()) for p in params) / SCALE
    optimizer.step()
    return largest, optimizer.loss_scale


def collectives(rank: int, path: str, way: str) -> list[str]:
    """Which calls of a step are collective, after the first step."""
    params = values((4, 2), seed=0)
    optimizer = wrapped(params, path)
    counted: list[str] = []
    own, now = distributed.all_reduce, ""

    def counting(*arguments: Any, **options: Any) -> Any:
        counted.append(now)
        return own(*arguments, **options)

    for step in range(2):
        distributed.all_reduce = counting if step else own
        for now in ("backward", "unscale_", "clip_grad_norm_", "step", "zero_grad"):
            if now == "backward":
                pass_over(optimizer, params, 0.5)
            elif now in ("step", "zero_grad") or now in way.split():
                getattr(optimizer, now)(*((1.0,) if now == "clip_grad_norm_" else ()))
    distributed.all_reduce = own
    return counted


def shards(rank: int, clips: bool, bad: int) -> Any:
    """FSDP2 over float32 weights; the gradient of one shard overflows in step 1."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    torch.manual_seed(0)
    model, twin = (nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)) for _ in "12")
    twin.load_state_dict(model.state_dict())
    for layer in (model[0], model[2], model):  # five rows over two ranks: uneven shards
        fully_shard(layer, mesh=mesh)
    pair = [
        wrapped(m.parameters(), "general", "AdamW", ranks=None if m is model else mpcore.Ranks())
        for m in (model, twin)
    ]
    found = []
    for step in range(4):
        x = torch.arange(24.0).view(4, 6) / 24 + step
        for m, optimizer, inputs in zip((model, twin), pair, (x[rank::2], x), strict=True):
            optimizer.backward(m(inputs).square().mean())
            grad: Any = next(iter(m.parameters())).grad
            if step == 1 and (m is twin or rank == bad):
                (grad if m is twin else grad.to_local())[0] = torch.inf
            if clips:
                optimizer.clip_grad_norm_(0.1)
            optimizer.step()
            optimizer.zero_grad()
        whole = [p.full_tensor().tolist() for p in model.parameters()]
        result, other = (optimizer.last_step for optimizer in pair)
        found.append(
            {
                "skipped": (result.skipped, other.skipped),
                "scales": (pair[0].loss_scale, pair[1].loss_scale),
                "norms": (result.grad_norm, other.grad_norm),
                "weights": (whole, [p.tolist() for p in twin.parameters()]),
            }
        )
    return found
