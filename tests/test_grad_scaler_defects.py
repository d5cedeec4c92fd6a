"""What torch.amp.GradScaler gets wrong, each beside what mpcore.GradScaler does about it.

Where torch's side is cheap to show, it is shown: the comparison fails when torch mends it.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.scalers import train, weight

THEIRS, OURS = torch.amp.GradScaler, mpcore.GradScaler
INF, NAN = float("inf"), float("nan")
HALVES = [torch.float16, torch.bfloat16]


def test_flags_of_several_devices_are_not_added_up() -> None:
    """Torch's fused kernels skip on exactly 1, and torch adds flags: 2 does not skip."""
    broken = weight(2)
    fused = torch.optim.Adam([broken], lr=0.1, fused=True)
    broken.grad = torch.full((2,), INF)
    fused.grad_scale, fused.found_inf = None, torch.tensor(2.0)
    fused.step()
    assert broken.isnan().all()

    class TwoDevices(OURS):
        def _note(self, optimizer: Any, check: Any, home: Any) -> Any:
            # as if a second device had found as much
            check.flags = {"one": next(iter(check.flags.values())), **check.flags}
            return super()._note(optimizer, check, home)

    param = weight(2)
    optimizer = torch.optim.Adam([param], lr=0.1, fused=True)
    scaler = TwoDevices("cpu")
    train(scaler, optimizer, param, [INF])
    assert param.tolist() == [1.0, 1.0]
    assert scaler.get_scale() == 2.0**15


@pytest.mark.filterwarnings("ignore:each of the last")
def test_the_scale_never_reaches_zero_and_no_clean_step_writes_nan() -> None:
    results = {}
    for kind in (THEIRS, OURS):
        param = weight(2)
        optimizer, scaler = torch.optim.SGD([param], lr=0.1), kind("cpu")
        train(scaler, optimizer, param, [INF] * 170 + [1.0])
        results[kind] = (scaler.get_scale(), param)
    assert results[THEIRS][0] == 0.0
    assert results[THEIRS][1].isnan().all()
    assert results[OURS][0] == 2.0**-126
    assert torch.equal(results[OURS][1].detach(), torch.full((2,), 1 - 0.1))


def test_the_scale_never_reaches_infinity() -> None:
    param = weight(2)
    scaler = OURS("cpu", growth_interval=1, max_scale=2.0**20)
    train(scaler, torch.optim.SGD([param], lr=0.0), param, [1.0] * 10)
    assert scaler.get_scale() == 2.0**20


@pytest.mark.parametrize("fused", [False, True])
def test_a_value_that_overflows_when_it_is_unscaled_is_an_overflow(fused: bool) -> None:
    results = {}
    for kind in (THEIRS, OURS):
        param = weight(2)
        scaler = kind("cpu", init_scale=1e-3)
        optimizer = torch.optim.SGD([param], lr=1.0, fused=fused)
        scaler.scale(param.sum())  # makes the scale
        param.grad = torch.tensor([1e37, 1.0])
        scaler.step(optimizer)
        scaler.update()
        results[kind] = (param.detach().isfinite().all().item(), scaler.get_scale())
    assert results[THEIRS] == (False, pytest.approx(1e-3))
    assert results[OURS] == (True, pytest.approx(5e-4))


def test_the_scale_grows_again_after_the_interval_was_lowered() -> None:
    results = {}
    for kind in (THEIRS, OURS):
        param = weight(2)
        optimizer, scaler = torch.optim.SGD([param], lr=0.0), kind("cpu")
        train(scaler, optimizer, param, [1.0] * 10)
        scaler.set_growth_interval(5)
        train(scaler, optimizer, param, [1.0] * 6)
        results[kind] = scaler.get_scale()
    assert results == {THEIRS: 2.0**16, OURS: 2.0**18}


def test_a_positional_closure_is_refused_and_not_run() -> None:
    ran = []
    for kind in (THEIRS, OURS):
        param = weight(2)
        optimizer, scaler = torch.optim.SGD([param], lr=0.1), kind("cpu")
        scaler.scale(param.sum()).backward()
        if kind is THEIRS:
            scaler.step(optimizer, lambda: ran.append("theirs"))
        else:
            with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
                scaler.step(optimizer, lambda: ran.append("ours"))
    assert ran == ["theirs"]


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_gradients_are_unscaled_after_a_warning_and_losses_are_counted(
    dtype: torch.dtype,
) -> None:
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    param = weight(4, dtype=dtype)
    optimizer, scaler = torch.optim.SGD([param], lr=0.5), OURS("cpu", init_scale=8.0)
    scaler.scale(param.sum())
    for expected in (1, 2):
        lost = [smallest, 0.0][: 3 - expected] + [smallest] * (expected - 1)
        param.grad = torch.tensor([16.0, 8.0, *lost]).to(dtype)
        if expected == 1:
            with pytest.warns(UserWarning, match=r"become 0.*MixedPrecisionOptimizer loses none"):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)  # one warning is enough
        assert param.grad.tolist() == [2.0, 1.0, 0.0, 0.0]
        assert scaler.last_step.flushed == expected
        scaler.update()
    assert param.tolist() == [-1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_tells_what_it_did(fused: bool) -> None:
    first, second, third = (weight(2) for _ in range(3))
    named = [("embedding.weight", first), ("head.bias", second), ("unused", third)]
    optimizer = torch.optim.AdamW(named, lr=0.1, fused=fused)
    scaler = OURS("cpu", init_scale=4.0)
    assert scaler.last_step is None
    for factor, skipped, names in ((1.0, False, []), (NAN, True, ["head.bias"])):
        optimizer.zero_grad()
        scaler.scale(first.sum() + (second * factor).sum()).backward()
        scaler.step(optimizer)
        step = scaler.last_step
        scaler.update()
        assert (step.skipped, step.overflowed(), step.loss_scale) == (skipped, names, 4.0)
        assert scaler.last_step_of(optimizer) is step
    assert repr(step) == "ScalerStep(skipped=True, loss_scale=4)"
    assert (scaler.steps, scaler.skipped_steps) == (2, 1)


def test_several_optimizers_are_skipped_each_for_itself_and_one_is_enough_to_back_off() -> None:
    good, bad = weight(2), weight(3)
    optimizers = [torch.optim.SGD([good], lr=0.5), torch.optim.SGD([bad], lr=0.5)]
    scaler = OURS("cpu", init_scale=4.0)
    scaler.scale([good.sum(), (bad * INF).sum()])[0].backward()
    (bad * INF).sum().backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    assert [scaler.last_step_of(o).skipped for o in optimizers] == [False, True]
    scaler.update()
    assert (good.tolist(), bad.tolist()) == ([0.5, 0.5], [1.0, 1.0, 1.0])
    assert (scaler.get_scale(), scaler.skipped_steps) == (2.0, 1)
    # an optimizer that is not stepped contributes nothing
    optimizers[1].zero_grad()
    optimizers[0].zero_grad()
    scaler.scale(good.sum()).backward()
    scaler.step(optimizers[0])
    scaler.update()
    assert scaler.skipped_steps == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.filterwarnings("ignore:GradScaler unscales 16-bit")
def test_sparse_gradients_are_unscaled_and_their_sums_looked_at(dtype: torch.dtype) -> None:
    param = weight(3, 2, dtype=dtype)
    optimizer, scaler = torch.optim.SGD([param], lr=1.0), OURS("cpu", init_scale=4.0)
    scaler.scale(param.sum())

    def gradient(values: list[float]) -> torch.Tensor:
        rows = torch.tensor([[v, v] for v in values], dtype=dtype)
        places = torch.tensor([[0, 0, 2]])
        return torch.sparse_coo_tensor(places, rows, (3, 2), check_invariants=True)

    param.grad = gradient([4.0, 8.0, 16.0])
    scaler.step(optimizer)
    scaler.update()
    assert param.tolist() == [[-2.0, -2.0], [1.0, 1.0], [-3.0, -3.0]]
    largest = torch.finfo(dtype).max
    param.grad = gradient([largest, largest, 1.0])
    if dtype != torch.float32:  # added in 16 bits
        scaler.step(optimizer)
        assert scaler.last_step.skipped


@pytest.mark.parametrize("dtype", HALVES)
def test_a_wrapped_optimizer_unscales_its_own_16_bit_gradients(dtype: torch.dtype) -> None:
    param = weight(3, dtype=dtype)
    inner = torch.optim.SGD([param], lr=0.5)
    optimizer = mpcore.MixedPrecisionOptimizer(inner)
    scaler = OURS("cpu", init_scale=4.0)
    scaler.scale(param.float().sum()).backward()
    scaler.unscale_(optimizer)
    assert param.grad.dtype == torch.float32
    assert param.grad.tolist() == [1.0] * 3
    scaler.step(optimizer)
    scaler.update()
    assert param.tolist() == [0.5] * 3
    assert optimizer.state[param]["master"].tolist() == [0.5] * 3
    assert param.grad.tolist() == [4.0] * 3  # scaled, as ever
    optimizer.zero_grad()
    scaler.scale((param.float() * INF).sum()).backward()
    scaler.step(optimizer)
    assert scaler.last_step.skipped
    assert optimizer.last_step.skipped
    assert param.tolist() == [0.5] * 3


def test_looking_changes_no_gradient_of_an_optimizer_that_unscales_itself() -> None:
    param = weight(3)
    seen = []

    class Looks(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None) -> None:
            seen.append((param.grad.tolist(), self.grad_scale.item(), self.found_inf.item()))

    scaler = OURS("cpu", init_scale=8.0)
    scaler.scale(param.sum()).backward()
    scaler.step(Looks([param], lr=0.1))
    assert seen == [([8.0] * 3, 8.0, 0.0)]


@pytest.mark.parametrize("fused", [False, True])
def test_an_expanded_gradient_is_given_memory_of_its_own(fused: bool) -> None:
    param = weight(3)
    optimizer, scaler = torch.optim.SGD([param], lr=0.5, fused=fused), OURS("cpu", init_scale=4.0)
    scaler.scale(param.sum())
    param.grad = torch.full((1,), 4.0).expand(3)
    scaler.step(optimizer)
    assert param.tolist() == [0.5] * 3


def test_a_gradient_penalty_follows_torchs_recipe() -> None:
    results = []
    for kind in (THEIRS, OURS):
        param = nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer, scaler = torch.optim.SGD([param], lr=0.1), kind("cpu", init_scale=16.0)
        loss = (param**3).sum()
        scaled = torch.autograd.grad(scaler.scale(loss), param, create_graph=True)
        penalty = (scaled[0] / scaler.get_scale()).norm()
        scaler.scale(loss + penalty).backward()
        scaler.step(optimizer)
        scaler.update()
        results.append(param.detach())
    assert same_bits([results[1]], [results[0]])


def test_accumulated_micro_batches_are_one_step() -> None:
    param = weight(2)
    optimizer, scaler = torch.optim.SGD([param], lr=0.5), OURS("cpu", init_scale=4.0)
    for _ in range(3):
        scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert param.tolist() == [-0.5, -0.5]
    assert scaler.steps == 1


def test_results_keep_no_optimizer_alive() -> None:
    param = weight(2)
    optimizer, scaler = torch.optim.SGD([param], lr=0.1), OURS("cpu")
    train(scaler, optimizer, param, [1.0])
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert not scaler.last_step.skipped


@pytest.mark.parametrize("fused", [False, True])
def test_float64_parameters_are_looked_at_too(fused: bool) -> None:
    param = weight(2, dtype=torch.float64)
    optimizer, scaler = torch.optim.SGD([param], lr=0.5, fused=fused), OURS("cpu", init_scale=4.0)
    train(scaler, optimizer, param, [1.0, NAN])
    assert param.tolist() == [0.5, 0.5]
    assert scaler.last_step.overflowed() == ["group 0, parameter 0, [2]"]


@pytest.mark.parametrize("fused", [False, True])
def test_distributed_gradients_are_looked_at_where_they_are(fused: bool, tmp_path: Any) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        param = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
        # torch has no fused SGD for them
        kind = torch.optim.Adam if fused else torch.optim.SGD
        optimizer, scaler = kind([param], lr=0.5, fused=fused), OURS("cpu")
        train(scaler, optimizer, param, [1.0, INF])
        assert torch.allclose(param.to_local(), torch.full((4,), 0.5))
        assert scaler.get_scale() == 2.0**15
        assert scaler.last_step.skipped
        assert scaler.last_step.overflowed() == ["group 0, parameter 0, [4]"]
    finally:
        torch.distributed.destroy_process_group()
