"""A step of the engine while a CUDA graph is captured: what it needs is on the device by then."""

import mpcore
import pytest
import torch
from mpcore.masters import step_plan

from mpcore_testing.engine_runs import OPTIMIZERS, Training


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_with_the_same_gradients_is_enough_of_a_warm_up(
    name, max_norm, capturing, uploads, device
):
    run = Training(OPTIMIZERS[name], torch.float16, "triton", float32=True, device=device)
    run.load(1)
    run.step(max_norm)
    run.load(2, in_place=True)
    uploads.clear()
    capturing.now = True
    run.step(max_norm)
    assert uploads == []


def test_a_learning_rate_in_a_tensor_may_change_between_replays(
    capturing, uploads, device, monkeypatch
):
    # of a CPU's tensors the engine takes the value
    monkeypatch.setattr(step_plan, "_learning_rate", lambda lr, device: lr)
    run = Training(OPTIMIZERS["AdamW"], torch.float16, "triton", float32=True, device=device)
    lr = torch.tensor(0.01, device=device)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.load(1)
    run.step()
    run.load(2, in_place=True)
    uploads.clear()
    capturing.now = True
    lr.fill_(0.0)
    before = [tensor.clone() for tensor in run.tensors()]
    run.step()
    assert uploads == []
    for param, weight in zip(run.params, before, strict=False):
        assert torch.equal(param, weight)


def test_new_gradients_are_refused_and_nothing_changes(capturing, device):
    run = Training(OPTIMIZERS["AdamW"], torch.float16, "triton", float32=True, device=device)
    run.load(1)
    run.step()
    kept = [param.grad for param in run.params]
    run.load(2)
    before = [tensor.clone() for tensor in run.tensors()]
    capturing.now = True
    with pytest.raises(RuntimeError, match=r"before the capture|got gradients that are new"):
        run.step()
    assert all(map(torch.equal, run.tensors(), before))
    assert len(kept) == 3


@pytest.mark.parametrize("clips", [False, True])
def test_a_training_step_as_the_docs_capture_it_uploads_nothing(clips, capturing, uploads, device):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)).to(device).half()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = mpcore.MixedPrecisionOptimizer(inner, backend="triton")
    x = torch.randn(5, 4, device=device).half()

    def step():
        optimizer.zero_grad(set_to_none=False)
        optimizer.backward(model(x).float().square().mean())
        if clips:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()

    for _ in range(2):
        step()
    uploads.clear()
    capturing.now = True
    step()
    assert uploads == []
    assert optimizer.steps == 3
