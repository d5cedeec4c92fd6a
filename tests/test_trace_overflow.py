"""`mpcore.trace_overflow` names the first module that went wrong, and leaves the model alone."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from typing import Any

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


class Attention(nn.Module):
    """Adds a mask to scores between its layers; `blown_up` overflows between its modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.h, self.blown_up = nn.Linear(4, 4), nn.Linear(4, 1), False

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.l(x) + mask
        if self.blown_up:
            scores = scores + 6e4
            scores = scores + 6e4
        return self.h(scores.softmax(-1))


class Mapping(UserDict):  # type: ignore[type-arg]
    """Batches of some libraries: no dictionary that PyTorch would look into."""


def with_mask(kind: type = dict) -> Any:
    mask = nn.Transformer.generate_square_subsequent_mask(4).half()
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).half()
    return kind({"x": x, "mask": mask})


def first_of(
    model: nn.Module, given: Any, loss: Callable[[Any], Tensor] = Tensor.sum, scale: float = 1.0
) -> tuple[str, str] | None:
    trace = mpcore.trace_overflow(model, given, lambda out: loss(out.float()), loss_scale=scale)
    return None if trace.first is None else (trace.first.phase, trace.first.module)


@pytest.mark.parametrize("kind", [dict, Mapping])
def test_a_mask_in_the_batch_is_no_fault(kind: type) -> None:
    trace = mpcore.trace_overflow(Attention().half(), with_mask(kind), lambda out: out.sum())
    assert trace.first is None
    assert not trace.frames[0].finite_out
    assert "Nothing went wrong" in str(trace)
    assert "batch" in str(trace)


def test_a_mask_in_the_batch_hides_no_fault() -> None:
    model = Attention().half()
    with torch.no_grad():
        model.h.weight.fill_(6e4)
    assert first_of(model, with_mask(), scale=2.0**4) == ("backward", "h")
    assert first_of(model, with_mask(Mapping), lambda out: (out * 1e20).square().sum()) == (
        "loss",
        "loss_of",
    )
    model = Attention().half()
    model.blown_up = True
    assert first_of(model, with_mask()) == ("forward", "")
    with torch.no_grad():
        model.l.weight[0, 0] = torch.nan
    assert first_of(model, with_mask()) == ("forward", "l")


class Weighted(nn.Module):
    """Weighs what its layer returns with the softmax of a mask alone."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.l(x) * mask.softmax(-1)


def test_an_overflow_that_needs_the_mask_is_still_not_the_batchs() -> None:
    """With ones in place of infinities no weight is 1, and no gradient overflows."""
    given = (torch.ones(4).half(), torch.tensor([0.0, *[-torch.inf] * 3]).half())
    assert first_of(Weighted().half(), given, scale=2.0**15) is None
    # the gradient of the output is 2^15, which a batch of two sums for the bias
    pair = (torch.ones(2, 4).half(), given[1])
    assert first_of(Weighted().half(), pair, scale=2.0**15) == ("backward", "l")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_goes_through_to_the_loss_is_the_batchs(bad: float) -> None:
    given = with_mask()
    given["x"][2, 1] = bad
    assert first_of(Attention().half(), given) == ("batch", "batch")
    given = with_mask()
    given["mask"].fill_(bad)  # no place is left: a softmax of nothing but -inf is NaN
    assert first_of(Attention().half(), given) == ("batch", "batch")


def test_a_batch_whose_gradients_are_nan_is_to_blame_though_its_loss_is_finite() -> None:
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.l(torch.ones(4)) * x
            return torch.where(x.isfinite(), y, 0.0)

    x = torch.ones(4)
    x[1] = torch.nan
    assert first_of(Rooted(), x) == ("batch", "batch")


def test_masks_of_logits_that_the_loss_absorbs_are_no_fault() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Masked())
    assert first_of(model, batch(0).float(), lambda out: out.softmax(-1)[:, 0].sum()) is None


def test_a_batch_that_the_first_module_writes_to_is_run_again_as_it_was() -> None:
    class Fills(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(torch.nan)

    x = batch(0).float()
    x[0, 0] = torch.inf
    model = nn.Sequential(Fills(), nn.Linear(4, 2))
    assert first_of(model, x) == ("forward", "0")
