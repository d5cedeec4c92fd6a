"""torch.compile over a whole training step: one graph break for each call of ours, no warnings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from mpcore_testing.bits import same_bits

# Dynamo looks at the `.grad` of a loss that crosses any graph break, in plain torch too
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

CALLS = ("zero_grad", "scale", "backward", "accumulate", "unscale_", "clip_grad_norm_", "step")


def compiled(train: Callable[[], None], steps: int = 3) -> tuple[int, int]:
    """Runs a step some times; returns the graph breaks and the graphs of them all."""
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(train, backend="eager")
    for _ in range(steps):
        step()
    return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


def engine_step(calls: tuple[str, ...], path: str, disable: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4).half()
    optimizer = mpcore.MixedPrecisionOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.1), path=path
    )
    keep = torch.compiler.disable if disable else lambda call: call
    use = {name: keep(getattr(optimizer, name)) for name in CALLS}
    x = torch.ones(2, 4).half()

    def train() -> None:
        use["zero_grad"]()
        loss = model(x).float().square().mean()
        if "scale" in calls:
            loss = use["scale"](loss)
        else:
            use["backward"](loss)
        for name in calls:
            if name == "clip_grad_norm_":
                use[name](1.0)
            elif name in ("accumulate", "unscale_"):
                use[name]()
        if "scale" not in calls:
            use["step"]()

    return train, model


@pytest.mark.parametrize("path", ["fused", "general"])
@pytest.mark.parametrize(
    "calls", [(), ("scale",), ("clip_grad_norm_",), ("accumulate",), ("unscale_",)]
)
def test_a_step_breaks_graphs_no_more_than_if_each_call_were_disabled(
    calls: tuple[str, ...], path: str
) -> None:
    train, model = engine_step(calls, path, False)
    expected, twin = engine_step(calls, path, True)
    assert compiled(train) == compiled(expected)
    plain, eager = engine_step(calls, path, False)
    for _ in range(3):
        plain()
    assert same_bits([*model.parameters()], [*eager.parameters()])
    assert same_bits([*model.parameters()], [*twin.parameters()])


def test_a_step_with_a_grad_scaler_has_a_break_for_each_call() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = mpcore.GradScaler("cpu", init_scale=8.0)

    def train() -> None:
        optimizer.zero_grad()
        loss = scaler.scale(model(torch.ones(2, 4)).square().mean())
        torch._dynamo.graph_break()
        loss.backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    breaks, graphs = compiled(train)
    # zero_grad, scale, the one written there, backward (or what is in it), unscale_, step, update
    assert breaks <= 7
    assert graphs <= 2
    assert scaler.steps == 3


def test_methods_keep_their_signatures_and_docstrings() -> None:
    names = list(inspect.signature(mpcore.MixedPrecisionOptimizer.step).parameters)
    assert names == ["self", "closure"]
    for owner in (mpcore.MixedPrecisionOptimizer, mpcore.GradScaler):
        for name in CALLS:
            if method := getattr(owner, name, None):
                assert method.__doc__
                assert method.__name__ == name


def test_step_hooks_run_once_and_see_the_call() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD([param], lr=0.5))
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    optimizer.backward(param.sum())
    optimizer.step()
    assert seen == ["before", "after"]
