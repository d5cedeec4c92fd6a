"""`mpcore.trace_overflow` names the first module that went wrong, and leaves the model alone."""

from __future__ import annotations

import copy

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.bits import same_bits
from mpcore_testing.faulty import Model, batch, loss_of

# where each fault shows first when the batch is run again
TRACES = {
    "weight": ("forward", "second"),
    "activation": ("forward", ""),
    "batch": ("batch", "batch"),
    "buffer": ("forward", "norm"),
}


@pytest.mark.parametrize("fault", TRACES)
def test_a_trace_names_the_first_module(fault: str) -> None:
    model, x = Model().half(), batch(0)
    model.norm.float()
    model.eval()
    with torch.no_grad():
        if fault == "weight":
            model.second.weight[1, 2] = torch.nan
        elif fault == "activation":
            model.blown_up = "third"  # in the model itself, between its modules
        elif fault == "batch":
            x[3, 1] = torch.inf
        else:
            assert model.norm.running_mean is not None
            model.norm.running_mean[1] = torch.inf
    trace = mpcore.trace_overflow(model, x, loss_of)
    assert trace.first is not None
    assert (trace.first.phase, trace.first.module) == TRACES[fault]
    assert "->" in str(trace)


def test_a_trace_finds_the_first_module_of_the_backward_pass() -> None:
    model = Model().half()
    model.norm.float()
    clean = mpcore.trace_overflow(model, batch(0), loss_of, loss_scale=2.0**10)
    assert clean.first is None
    assert {frame.phase for frame in clean.frames} == {"batch", "forward", "loss", "backward"}
    trace = mpcore.trace_overflow(model, batch(0), loss_of, loss_scale=2.0**30)
    assert trace.first is not None
    assert (trace.first.phase, trace.first.module) == ("backward", "loss_of")
    with torch.no_grad():
        model.third.weight.mul_(1e4)
    trace = mpcore.trace_overflow(model, batch(0), loss_of, loss_scale=2.0**4)
    assert trace.first is not None
    assert (trace.first.phase, trace.first.module) == ("backward", "third")
    assert trace.first.finite_in


def test_a_trace_leaves_the_model_as_it_was() -> None:
    model = Model().half()
    model.norm.float()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    grads = [param.grad for param in model.parameters()]
    before = dict(copy.deepcopy(model.state_dict())), torch.get_rng_state()
    mpcore.trace_overflow(model, (batch(0),), lambda out: loss_of(nn.functional.dropout(out)))
    mpcore.trace_overflow(model, {"x": batch(0)}, loss_of)
    assert same_bits((dict(model.state_dict()), torch.get_rng_state()), before)
    assert all(param.grad is grad for param, grad in zip(model.parameters(), grads, strict=True))
    assert not any(module._forward_hooks for module in model.modules())
    loss_of(model(batch(0))).backward()  # no hook of a parameter is left


def masked(x: Tensor) -> Tensor:
    return x.masked_fill(torch.arange(4) > 2, -torch.inf)


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return masked(x)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(1e30).mul_(1e30)


class Averaging(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x


def test_infinities_that_a_softmax_absorbs_are_no_fault() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Masked(), nn.Softmax(-1), nn.Linear(4, 2))
    assert mpcore.trace_overflow(model, batch(0).float(), loss_of).first is None
    assert mpcore.preflight(model, batch(0).float(), loss_of).dtype == torch.float16
    with torch.no_grad():
        model[3].weight[0, 0] = torch.inf
    trace = mpcore.trace_overflow(model, batch(0).float(), loss_of)
    assert trace.first is not None
    assert trace.first.module == "3"


def test_a_module_that_writes_to_its_input_is_named_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 4), InPlace(), nn.Linear(4, 2))
    trace = mpcore.trace_overflow(model, batch(0).float(), loss_of)
    assert trace.first is not None
    assert (trace.first.phase, trace.first.module) == ("forward", "1")


def test_buffers_that_a_module_replaces_are_put_back() -> None:
    model = nn.Sequential(Averaging(), nn.Linear(4, 2))
    buffer = model[0].mean
    mpcore.trace_overflow(model, batch(0).float() * torch.nan, loss_of)
    mpcore.preflight(model, batch(0).float(), loss_of)
    assert model[0].mean is buffer
    assert torch.equal(buffer, torch.zeros(4))
