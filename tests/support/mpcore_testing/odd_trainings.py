"""Healthy trainings that look odd: nothing that is said of them may ask for anything."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpcore
import torch
from torch import Tensor, nn

from mpcore_testing.verdict_cases import Layer, Net, Training


def _with(steps: int, loss_of: Callable[[Training, Tensor], Tensor], **settings: Any) -> Any:
    def train() -> Training:
        training = Training(**settings)
        return training.run(steps, lambda loss: loss_of(training, loss))

    return train


class Masked(Net):
    """Attention over 4 numbers, of which a mask hides the last, by -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, -math.inf]))

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) + self.get_buffer("mask")).float().softmax(-1)


class LateMask(Net):
    """A mask that is made in the first pass."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        mask = torch.zeros(4, dtype=out.dtype)
        mask[-1] = -math.inf
        self.register_buffer("mask", mask)
        return (out + mask).float().softmax(-1)


class Rows(nn.Module):
    """An embedding of many rows, few of which have gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5000, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x[:, 0].abs() * 5).long())


class Dead(Net):
    """A layer behind a ReLU that is nearly always 0."""

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.first(x) - 3)) + x * self.second.weight.mean()


class Adapted(Net):
    """LoRA: of a frozen layer and two factors, B from 0, so that A stands at first."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 4) / 2)
        self.up = nn.Parameter(torch.zeros(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.t() @ self.up.t()


class Gated(Net):
    """ReZero: a layer behind a factor that begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(x + self.gate * self.first(x) + self.second(x))


class Scaled(Net):
    """Large gains, which no update moves, beside layers that learn."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((64,), 100.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-7 * self.gain.float().mean().to(x.dtype)


class Biases(Net):
    """Biases alone learn, from 0."""

    def __init__(self) -> None:
        super().__init__()
        for name, param in self.named_parameters():
            param.requires_grad_(name.endswith("bias"))


def _layer_wise() -> Training:
    """The first layers have a learning rate of nearly 0."""
    training = Training()
    group = training.optimizer.param_groups[0]
    first = [*training.model.first.parameters(), *training.model.second.parameters()]
    some = set(map(id, first))
    group["params"] = [param for param in group["params"] if id(param) not in some]
    training.optimizer.add_param_group({"params": first, "lr": 1e-12})
    return training.run(80)


def _frozen() -> Net:
    model = Net()
    model.first.requires_grad_(False)
    return model


def _resumed() -> Training:
    first = Training(scale=mpcore.DynamicLossScale(2.0**10, growth_interval=20)).run(15)
    again = Training(scale=mpcore.DynamicLossScale(2.0**10, growth_interval=20))
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    again.model.load_state_dict(first.model.state_dict())
    return again.run(60)


def _accumulated_search() -> Training:
    return Training("accumulation", mpcore.DynamicLossScale(2.0**24)).run(40)


def _warm_up() -> Training:
    training = Training(lr=0.0)
    for step in range(60):
        training.optimizer.param_groups[0]["lr"] = max(step - 40, 0) * 1e-3
        training.step(lambda loss, step=step: loss * (30 if step in (42, 47) else 1))
    return training


ODD: dict[str, Callable[[], Training]] = {
    "a search from 2^24": _with(40, lambda t, loss: loss, scale=mpcore.DynamicLossScale(2.0**24)),
    "a search from 2^24, two passes": _accumulated_search,
    "a search with hysteresis": _with(
        60, lambda t, loss: loss, scale=mpcore.DynamicLossScale(2.0**24, hysteresis=3)
    ),
    "probes every 20 steps": _with(
        200, lambda t, loss: loss, scale=mpcore.DynamicLossScale(2.0**14, growth_interval=20)
    ),
    "probes in closures": _with(
        *(150, lambda t, loss: loss),
        setting="closure",
        scale=mpcore.DynamicLossScale(2.0**14, growth_interval=20),
    ),
    "headroom": _with(80, lambda t, loss: loss, scale=mpcore.HeadroomLossScale()),
    "a warm-up with spikes": _warm_up,
    "losses of a GAN": _with(60, lambda t, loss: loss * (-1) ** t.steps + 3 * math.sin(t.steps)),
    "a loss below 0": _with(60, lambda t, loss: loss - 100),
    "a sum over a million": _with(
        60,
        lambda t, loss: loss * 1e6,
        scale=mpcore.DynamicLossScale(2.0**16, min_scale=2.0**-20),
        lr=1e-8,
    ),
    "a loss of 0": _with(80, lambda t, loss: loss * 0),
    "a loss of 0 now and then": _with(80, lambda t, loss: loss * (t.steps % 3 == 0)),
    "a loss that grows": _with(80, lambda t, loss: loss + t.steps**2),
    "an outlier that does not overflow": _with(60, lambda t, loss: loss + 1e5 * (t.steps == 40)),
    "a mask of -inf": _with(40, lambda t, loss: loss, model=Masked()),
    "a mask that is made late": _with(40, lambda t, loss: loss, model=LateMask()),
    "dead units": _with(60, lambda t, loss: loss, model=Dead()),
    "sparse rows": _with(80, lambda t, loss: loss, model=Rows()),
    "frozen layers": _with(60, lambda t, loss: loss, model=_frozen()),
    "an adapter whose B begins at 0": _with(80, lambda t, loss: loss, model=Adapted(), lr=1e-4),
    "an adapter, a loss that is small": _with(
        *(80, lambda t, loss: loss * 1e-2), model=Adapted(), lr=1e-3
    ),
    "a gate that begins at 0": _with(80, lambda t, loss: loss, model=Gated(), lr=1e-5),
    "gains that stand still": _with(80, lambda t, loss: loss, model=Scaled()),
    "biases alone": _with(80, lambda t, loss: loss, model=Biases(), lr=1e-6),
    "layers with a learning rate of nearly 0": _layer_wise,
    "a learning rate of 0": _with(80, lambda t, loss: loss, lr=0.0),
    "bfloat16 without a scale": _with(
        60, lambda t, loss: loss, setting="bfloat16", scale=mpcore.NoLossScale()
    ),
    "bfloat16 with a scale that grows": _with(
        *(100, lambda t, loss: loss),
        setting="bfloat16",
        scale=mpcore.DynamicLossScale(2.0**10, growth_interval=5),
    ),
    "a clip to a small norm": _with(60, lambda t, loss: loss, setting="clip"),
    "one layer": _with(60, lambda t, loss: loss, model=nn.Sequential(Layer())),
    "a run that was resumed": _resumed,
    "tiny losses under a large scale": _with(  # at a rate of 1e-2 no weight would move
        60, lambda t, loss: loss * 1e-6, scale=mpcore.StaticLossScale(2.0**20), lr=1e4
    ),
}
