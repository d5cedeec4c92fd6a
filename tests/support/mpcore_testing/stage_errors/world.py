"""Trainings in the settings in which people meet a `StageError`, and what a row of a table is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mpcore
import torch
from torch import Tensor, nn

from mpcore_testing.engines import Engine

#: How gradients are cleared, and who scales.
OWN, MODEL = "optimizer.zero_grad()", "model.zero_grad()"
TORCH, OURS = "torch's GradScaler", "mpcore's GradScaler"
TRAINER = "mpcore's GradScaler, model.zero_grad()"
TWO, CLOSURE = "two optimizers", "closure"
SCALE = mpcore.DynamicLossScale(2.0**6)


class Inner(torch.optim.SGD):
    """SGD with a method of its own, and a step that may ignore closures."""

    ignores = False

    def step(self, closure: Any = None) -> Any:
        return super().step(None if self.ignores else closure)

    def train(self) -> None:
        """What schedule-free optimizers have."""


class World:
    """A training of two layers, 16 bits and float32, in one of the settings.

    Where there are two optimizers, the second has the second layer, and a loss of its own that
    goes through the first layer as well.

    Args:
        engine: Computes the steps.
        setting: One of the above.
        scale: Of the optimizers.
        rule: For weights that others write to.
        inner: What is wrapped.
        dtype: Of the first layer.
    """

    def __init__(
        self,
        engine: Engine,
        setting: str = OWN,
        *,
        scale: Any = SCALE,
        rule: str = "adopt",
        inner: Any = torch.optim.SGD,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        torch.manual_seed(0)
        self.engine, self.setting = engine, setting
        self.low, self.high = nn.Linear(4, 3).to(dtype), nn.Linear(3, 2)
        self.model = nn.ModuleList([self.low, self.high])
        groups = [self.model.parameters()]
        if setting == TWO:
            groups = [self.low.parameters(), self.high.parameters()]
        self.optimizers = [
            engine.wrap(inner(params, lr=0.1, momentum=0.9), scale, rule) for params in groups
        ]
        self.scaler: Any = None
        if setting in (TORCH, OURS, TRAINER):
            self.scale_outside(torch.amp.GradScaler if setting == TORCH else mpcore.GradScaler)
        self.notes: list[Any] = []  # what a provocation hands to whoever follows the advice

    def scale_outside(self, kind: Any = mpcore.GradScaler) -> None:
        """Lets a GradScaler scale from now on."""
        self.scaler = kind("cpu", init_scale=2.0**6)

    @property
    def optimizer(self) -> Any:
        """The first one."""
        return self.optimizers[0]

    def loss(self, seed: int, factor: float = 1.0) -> Any:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        hidden = (x.to(self.low.weight.dtype).unsqueeze(-2) * self.low.weight).sum(-1)
        return self.high((hidden + self.low.bias).float()).square().mean() * factor

    def zero(self) -> None:
        """Clears gradients in this setting's way."""
        if self.setting in (MODEL, TRAINER):
            self.model.zero_grad()
        else:
            for optimizer in self.optimizers:
                optimizer.zero_grad()

    def backward(self, seed: int) -> None:
        """The backward pass in this setting's way."""
        if self.scaler is None:
            self.optimizer.backward(self.loss(seed))
        else:
            self.scaler.scale(self.loss(seed)).backward()

    def unscale(self) -> None:
        """What comes before a clip."""
        if self.scaler is None:
            self.optimizer.unscale_()
        else:
            self.scaler.unscale_(self.optimizer)

    def finish(self) -> None:
        """Ends a step whose backward pass was run."""
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
            return
        self.optimizer.step()
        if self.setting == TWO:
            self.second()

    def second(self) -> None:
        """The step of the second optimizer."""
        optimizer = self.optimizers[1]
        optimizer.zero_grad()
        optimizer.backward(self.loss(99))
        optimizer.step()

    def step(self, seed: int) -> None:
        """A whole step."""
        if self.setting == CLOSURE:
            self.optimizer.step(lambda: self.evaluate(seed))
            return
        self.zero()
        self.backward(seed)
        self.finish()

    def evaluate(self, seed: int) -> Any:
        """What a closure does."""
        self.optimizer.zero_grad()
        loss = self.loss(seed)
        self.optimizer.backward(loss)
        return loss

    def save(self) -> Any:
        """A checkpoint."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return copy.deepcopy((self.model.state_dict(), states))

    def load(self, saved: Any) -> None:
        """Goes back to it."""
        self.model.load_state_dict(saved[0])
        for optimizer, state in zip(self.optimizers, saved[1], strict=True):
            optimizer.load_state_dict(state)

    def contents(self) -> list[Tensor]:
        """Weights, masters and loss scales."""
        found: list[Tensor] = [param.detach() for param in self.model.parameters()]
        for optimizer in self.optimizers:
            found += [s["master"].detach() for s in optimizer.state.values() if "master" in s]
            found.append(torch.tensor(optimizer.loss_scale))
        return found


Do = Callable[[World], Any]


def second_step(world: World) -> None:
    """What was to be done when the error came."""
    world.step(2)


@dataclass(frozen=True)
class Row:
    """An error, and one remedy of its message.

    Attributes:
        name: What goes wrong, and the remedy.
        site: Where the error is raised: a name of `sites`.
        settings: Where people meet it.
        provoke: Raises it, after one step.
        says: The words of the message that name the remedy.
        follow: What they say, and the rest of the second step.
        twin: What a training does instead that never went wrong.
        options: How the training is made.
        begun: Whether a step comes first.
        general_only: Whether a fused step cannot get there.
        fused_only: Whether the general path cannot.
    """

    name: str
    site: str
    settings: tuple[str, ...]
    provoke: Do
    says: str
    follow: Do = second_step
    twin: Do = second_step
    options: dict[str, Any] = field(default_factory=dict)
    begun: bool = True
    general_only: bool = False
    fused_only: bool = False
