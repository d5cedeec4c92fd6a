"""An engine and the model of it, which are given the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpcore
import numpy as np
import pytest
import torch
from mpcore.backends import resolve
from torch import Tensor, nn

from mpcore_testing.engines import Engine
from mpcore_testing.failing import Failing
from mpcore_testing.sequences.model import Model
from mpcore_testing.sequences.numbers import Near
from mpcore_testing.sequences.scales import Scale
from mpcore_testing.sequences.settings import SCALES, build
from mpcore_testing.sequences.state import EVERY, PARAMETERS, Refused


class Stops(Exception):
    """What a hook or a closure of the user raises."""


def shaped(values: Any, i: int) -> Tensor:
    """Values in the shape of parameter `i`, and its dtype; the bfloat16 one is transposed."""
    tensor = torch.tensor(np.asarray(values)).to(getattr(torch, PARAMETERS[i][0]))
    return tensor.view(2, 2).t().contiguous().t() if i == 1 else tensor


def flat(tensor: Tensor) -> Any:
    """The numbers of a tensor, in float64."""
    return tensor.detach().reshape(-1).double().numpy()


class Pair:
    """What the operations work on.

    Args:
        engine: What is tested.
        optimizer: A key of `mpcore_testing.sequences.optimizers.RATES`.
        scale: A key of `SCALES`.
        patch: Puts a backend that can fail in the place of the real one.
    """

    def __init__(
        self, engine: Engine, optimizer: str, scale: str, patch: pytest.MonkeyPatch
    ) -> None:
        self.engine = engine
        name, backend = resolve(engine.backend, [torch.device("cpu")], [])
        self.backend = Failing(backend)
        patch.setattr("mpcore.engine.wrapper.resolve", lambda *_: (name, self.backend))
        self.model = Model(optimizer, Scale.first(scale), engine.fused)
        self.params = [nn.Parameter(shaped(self.model.weights[i], i)) for i in EVERY]
        self.optimizer: Any = self.wrap()
        self.saved: Any = None  # a checkpoint: state, weights, and the model's
        self.hears_all = True  # an injected fault may swallow a warning

    def wrap(self) -> mpcore.MixedPrecisionOptimizer:
        """A fresh optimizer over `params`."""
        groups: list[dict[str, Any]] = [{"params": self.params[:2]}, {"params": self.params[2:]}]
        for group, rate in zip(groups, self.model.rates, strict=True):
            group["lr"] = rate
        inner = build(self.model.optimizer, groups)
        return self.engine.wrap(inner, SCALES[self.model.scale.name])

    def both(self, engine: Callable[[], Any], model: Callable[[], Any]) -> tuple[Any, Any]:
        """Does the same to both, returns what they return; where one refuses, the other has to."""
        try:
            expected = model()
        except Refused as reason:
            try:
                engine()
            except mpcore.StageError:
                return None, None
            raise AssertionError(f"expected a StageError: {reason}") from reason
        return engine(), expected

    def loss(self, grads: dict[int, list[float]]) -> Tensor:
        """A loss with these gradients."""
        terms = [
            (self.params[i].float() * shaped(values, i).float()).sum()
            for i, values in grads.items()
        ]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def write(self, i: int, values: Any) -> None:
        """Writes a weight, in place."""
        self.params[i].copy_(shaped(values, i))

    @staticmethod
    def check_near(what: str, actual: Any, expected: Near | None) -> None:
        assert (actual is None) == (expected is None), f"{what}: {actual}, expected {expected}"
        if expected is not None:
            assert expected.holds(actual), f"{what}: {actual}, expected {expected}"
