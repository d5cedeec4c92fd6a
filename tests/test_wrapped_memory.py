"""Parameters and gradients without memory of their own: the general path, or one error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mpcore
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mpcore.backends import compiled, reference
from mpcore.base.memory import all_in_memory, why_no_memory
from mpcore.engine.wrapped_passes import WrappedPasses
from mpcore.updates import Batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import ENGINES, Engine

SCALE = mpcore.DynamicLossScale(2.0**8, growth_interval=2)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path: Path = tmp_path_factory.mktemp("ranks") / "store"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def values(dtype: torch.dtype) -> Tensor:
    return torch.linspace(-1, 1, 24).view(6, 4).to(dtype)


def wrapped(kind: str, value: Tensor, mesh: Any) -> Any:
    if kind == "DTensor":
        return distribute_tensor(value.clone(), mesh, [Shard(0)])
    return TwoTensor(value.clone(), value.clone())


def held(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found.a if isinstance(found, TwoTensor) else found


def train(param: Any, optimizer: Any, give: Any, what: str) -> None:
    for seed in range(5):
        noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        if seed == 2:
            noise[3, 1] = torch.inf

        def backward(noise: Tensor = noise) -> Tensor:
            scale = optimizer.scale(torch.ones(()))
            param.grad = give((noise * scale).to(param.dtype))
            return scale

        if what == "closure":
            optimizer.step(backward)
        else:
            backward()
            if what == "clip":
                optimizer.clip_grad_norm_(0.5)
            elif what == "unscale":
                optimizer.unscale_()
            elif what == "accumulate":
                optimizer.accumulate()
                backward()
                optimizer.accumulate()
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("what", ["step", "clip", "unscale", "accumulate", "closure"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["DTensor", "TwoTensor"])
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_wrapped_parameter_trains_bit_for_bit_like_a_plain_one(
    engine: Engine, kind: str, dtype: torch.dtype, what: str, mesh: Any
) -> None:
    if kind == "TwoTensor" and engine.fused:
        pytest.skip("no address to update at")
    plain, other = nn.Parameter(values(dtype)), nn.Parameter(wrapped(kind, values(dtype), mesh))
    straight = engine.wrap(torch.optim.AdamW([plain], lr=0.1), SCALE)
    inside = engine.wrap(torch.optim.AdamW([other], lr=0.1), SCALE)
    assert isinstance(inside._module, WrappedPasses)
    train(plain, straight, lambda grad: grad, what)
    train(other, inside, lambda grad: wrapped(kind, grad, mesh), what)
    if what == "clip" and engine.backend != "cpu" and kind == "TwoTensor":
        assert torch.allclose(held(other), plain.detach(), rtol=2e-3)  # norms of another backend
    else:
        assert same_bits(held(other), plain.detach())
    assert (inside.steps, inside.skipped_steps) == (5, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_fully_sharded_model_takes_the_fused_path_by_itself_and_resumes(
    dtype: torch.dtype, mesh: Any
) -> None:
    def build() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
        fully_shard(model, mesh=mesh)
        return model, mpcore.MixedPrecisionOptimizer(torch.optim.AdamW(model.parameters()), SCALE)

    def run(model: nn.Module, optimizer: Any, seeds: Any) -> None:
        for seed in seeds:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
            optimizer.backward(model(x).float().square().mean())
            optimizer.clip_grad_norm_(0.01)
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = build()
    assert [path.path for path in optimizer.path] == ["fused"]
    before = [held(p).clone() for p in model.parameters()]
    run(model, optimizer, range(3))
    assert not any(same_bits(held(p), b) for p, b in zip(model.parameters(), before, strict=True))
    other, resumed = build()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    run(model, optimizer, range(3, 6))
    run(other, resumed, range(3, 6))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(held(one), held(two))


@pytest.mark.parametrize("backend", ["auto", "cpu", "compiled"])
def test_a_fused_step_over_other_wrappers_is_refused_by_name(backend: str, mesh: Any) -> None:
    param = nn.Parameter(wrapped("TwoTensor", values(torch.float32), mesh))
    with pytest.raises(mpcore.ArgumentError, match=r"address: a TwoTensor has no memory of its"):
        mpcore.MixedPrecisionOptimizer(
            torch.optim.AdamW([param]), SCALE, backend=backend, path="fused"
        )


BAD: dict[str, tuple[Any, str]] = {
    "sparse": (lambda: torch.ones(2, 2).to_sparse(), "sparse_coo"),
    "meta": (lambda: torch.ones(2, device="meta"), "meta device"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested tensor"),
    "functional": (lambda: torch._to_functional_tensor(torch.ones(2)), "functional"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", BAD)
def test_parameters_without_values_in_memory_are_refused_by_the_constructor(
    engine: Engine, case: str
) -> None:
    build, message = BAD[case]
    bad = build()
    if not hasattr(bad, "requires_grad"):
        pytest.skip("no parameter")
    inner = torch.optim.SGD([nn.Parameter(torch.ones(2)), nn.Parameter(bad)], lr=0.1)
    with pytest.raises(mpcore.ArgumentError, match=rf"parameter 1.*{message}"):
        engine.wrap(inner)
    assert "mpcore" not in inner.param_groups[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_gradient_of_another_kind_is_refused_by_the_call_that_meets_it(
    engine: Engine, dtype: torch.dtype, mesh: Any
) -> None:
    param = nn.Parameter(values(dtype))
    optimizer = engine.wrap(torch.optim.AdamW([param]), mpcore.NoLossScale())
    param.grad = wrapped("TwoTensor", values(dtype), mesh)
    for call in (
        optimizer.step,
        optimizer.unscale_,
        optimizer.accumulate,
        lambda: optimizer.clip_grad_norm_(1.0),
    ):
        with pytest.raises(mpcore.ArgumentError, match="TwoTensor has no memory of its own"):
            call()
    assert same_bits(param.detach(), values(dtype))
    param.grad = values(dtype)
    optimizer.step()
    assert optimizer.steps == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gradient_that_is_the_negative_of_its_memory_trains_by_its_values(
    engine: Engine, dtype: torch.dtype
) -> None:
    runs = []
    for lazy in (False, True):
        param = nn.Parameter(values(dtype))
        optimizer = engine.wrap(torch.optim.SGD([param], lr=0.1), mpcore.NoLossScale())
        for _ in range(3):
            grad = torch._neg_view(values(dtype))  # as the imaginary part of a conjugate is
            param.grad = grad if lazy else grad.resolve_neg()
            assert param.grad.is_neg() == lazy
            optimizer.step()
        runs.append(param.detach().clone())
    assert same_bits(*runs)


def test_c_is_never_handed_the_address_zero(mesh: Any) -> None:
    two = wrapped("TwoTensor", torch.ones(4), mesh)
    assert not all_in_memory([torch.ones(1), two])
    assert why_no_memory(torch.empty(0)) is None
    # FSDP's gradients have an offset into no storage: an address that is not 0
    offset = torch.Tensor._make_wrapper_subclass(TwoTensor, (2,), strides=(1,), storage_offset=3)
    assert offset.data_ptr() != 0
    assert not all_in_memory([offset])
    with pytest.raises(mpcore.ArgumentError, match="memory of their own"):
        compiled.inspect([two], torch.ones(()), 1.0)


def test_a_clip_over_shards_of_several_ranks_is_refused_before_anything_is_read() -> None:
    shard: Any = SimpleNamespace(device_mesh=SimpleNamespace(size=lambda: 2))
    with pytest.raises(mpcore.ArgumentError, match=r"scaler\.unscale_\(optimizer\)"):
        WrappedPasses(reference).inspect([shard], torch.ones(()), 1.0)


@pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized",
    "ignore:.*_sharded_tensor:FutureWarning",
)
@pytest.mark.parametrize("path", ["fused", "general"])
def test_weights_that_a_checkpoint_is_loaded_into_become_masters(
    path: str, mesh: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 6).half()
    fully_shard(model, mesh=mesh)
    inner = torch.optim.SGD(model.parameters(), lr=2.0**-4)
    optimizer = mpcore.MixedPrecisionOptimizer(inner, mpcore.NoLossScale(), path=path)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path)
    saved = [held(p).clone() for p in model.parameters()]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not any(same_bits(held(p), s) for p, s in zip(model.parameters(), saved, strict=True))
    dcp.load(model.state_dict(), checkpoint_id=tmp_path)  # counts as a write nowhere
    assert all(same_bits(held(p), s) for p, s in zip(model.parameters(), saved, strict=True))
    with pytest.warns(UserWarning, match="became their float32 masters"):
        optimizer.step()
    for param, weight in zip(model.parameters(), saved, strict=True):
        assert same_bits(held(optimizer.state[param]["master"]), weight.float() - 2.0**-4)


def test_pieces_that_are_cut_in_another_way_never_reach_an_update() -> None:
    batch = Batch(
        masters=[torch.ones(4)], weights=None, moments=[[torch.ones(3)]], steps=None, groups=[0]
    )
    with pytest.raises(mpcore.ArgumentError, match=r"like the master's, got \[3\]"):
        WrappedPasses(reference).plan_update("sgd", [batch])
