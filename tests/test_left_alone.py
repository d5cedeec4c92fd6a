"""Looking at a step changes nothing, whatever the model does in it and however it ends."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import mpcore
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.bits import same_bits

LOOKS: dict[str, Callable[..., Any]] = {
    "trace_overflow": mpcore.trace_overflow,
    "preflight": mpcore.preflight,
}


class Busy(nn.Module):
    """Writes to everything that it can reach while it runs."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(8, 4, max_norm=0.1)
        self.norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.cache, self.log = 0, {"none": 0}, [1]
        self.fails = ""

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept = self.cache["last"] = x
        self.log.append(random.randrange(100))
        np.random.rand()  # noqa: NPY002 (the global generator is what has to be as before)
        self.seen = self.seen + 1
        self.train(not self.training)
        x.mul_(2)
        y = self.norm(self.table(ids) + x + 0.1 * torch.rand_like(x))
        if self.fails == "forward":
            raise KeyError(self.fails)
        if self.fails == "backward":
            y.register_hook(self._fail)
        self.train(not self.training)
        return self.last(y)

    def _fail(self, grad: Tensor) -> None:
        raise KeyError(self.fails)

    def loss(self, output: Tensor) -> Tensor:
        if self.fails == "loss":
            raise KeyError(self.fails)
        return output.float().square().mean()


def everything(model: Busy, given: tuple[Tensor, ...]) -> Any:
    """All that has to be as before, copied."""
    attributes = {
        name: {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers")}
        for name, module in model.named_modules()
    }
    shown = {
        name: {key: copy.copy(value) for key, value in items.items()}
        for name, items in attributes.items()
    }
    legacy = str(np.random.get_state())  # noqa: NPY002
    numbers = random.getstate(), legacy, torch.get_rng_state()
    tensors = [*model.state_dict().values(), *given]
    memory = [tensor.data_ptr() for tensor in tensors]
    return shown, numbers[:2], memory, copy.deepcopy((tensors, numbers[2]))


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("fails", ["", "forward", "loss", "backward"])
def test_everything_is_as_before(name: str, fails: str) -> None:
    model = Busy()
    model.fails = fails
    grads = [torch.ones_like(param) for param in model.parameters()]
    for param, grad in zip(model.parameters(), grads, strict=True):
        param.grad = grad
    fired: list[Tensor] = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(fired.append)
    given = torch.arange(8), torch.randn(8, 4)
    *plain, tensors = everything(model, given)
    if fails:
        with pytest.raises(KeyError, match=fails):
            LOOKS[name](model, given, model.loss)
    else:
        LOOKS[name](model, given, model.loss)
    *plain_after, tensors_after = everything(model, given)
    assert plain_after == plain
    assert same_bits(tensors_after, tensors)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert fired == []
    assert same_bits(grads, [torch.ones_like(grad) for grad in grads])
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    model.fails = ""
    model(*given).sum().backward()  # no hook is left, but for those that were there
    assert len(fired) == len(grads)


def test_a_batch_with_a_graph_gets_no_gradients() -> None:
    source = torch.ones(2, 4, requires_grad=True)
    model = nn.Linear(4, 1)
    for look in LOOKS.values():
        look(model, source * 2, lambda out: out.square().mean())
    assert source.grad is None
    assert model.weight.grad is None
    leaf = torch.ones(2, 4, requires_grad=True)
    mpcore.trace_overflow(model, leaf, lambda out: out.sum() * torch.inf)
    assert leaf.grad is None


def test_weights_of_a_loss_are_left_alone_too() -> None:
    criterion = nn.Linear(1, 1)
    criterion.weight.grad = grad = torch.ones(1, 1)
    fired: list[Tensor] = []
    criterion.weight.register_post_accumulate_grad_hook(fired.append)
    for look in LOOKS.values():
        look(nn.Linear(4, 1), torch.ones(2, 4), lambda out: criterion(out.float()).square().mean())
    assert criterion.weight.grad is grad
    assert torch.equal(grad, torch.ones(1, 1))
    assert criterion.bias.grad is None
    assert fired == []
