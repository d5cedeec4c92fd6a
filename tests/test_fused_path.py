"""Which path a step takes, what says so, and what happens when that changes in mid-training."""

from __future__ import annotations

from typing import Any

import mpcore
import pytest
import torch
from mpcore.errors import ArgumentError
from torch import nn

from mpcore_testing.engines import FUSABLE, FUSED, Engine

SCALE = mpcore.DynamicLossScale(init=2.0**8, growth_interval=5)
BUILD: dict[str, Any] = {
    "adam": lambda p, **o: torch.optim.Adam(p, lr=0.01, **o),
    "adamw": lambda p, **o: torch.optim.AdamW(p, lr=0.01, **o),
    "sgd": lambda p, **o: torch.optim.SGD(p, lr=0.01, momentum=0.9, **o),
    "adagrad": lambda p, **o: torch.optim.Adagrad(p, lr=0.01, **o),
    "lion": lambda p, **o: mpcore.optim.Lion(p, lr=0.01, **o),
}


def weights(*dtypes: torch.dtype) -> list[nn.Parameter]:
    dtypes = dtypes or (torch.float16, torch.bfloat16, torch.float32)
    return [nn.Parameter(torch.linspace(-1, 2, 6).to(dtype)) for dtype in dtypes]


def wrap(inner: torch.optim.Optimizer, path: str = "auto", backend: str = "cpu") -> Any:
    return mpcore.MixedPrecisionOptimizer(inner, SCALE, backend=backend, path=path)


def shown(optimizer: Any) -> list[str]:
    """What `path` says, which `repr` says as well."""
    for number, path in enumerate(optimizer.path):
        assert f"{number}: {path.path}: {path.reason}" in repr(optimizer)
    return [str(path) for path in optimizer.path]


def train(optimizer: Any, steps: int, seed: int = 0) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        scale = float(optimizer.scale(torch.ones(())))
        for param in params:
            param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)
        optimizer.step()
        optimizer.zero_grad()


def masters(optimizer: Any) -> list[torch.Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state.get(p, {}).get("master", p).detach().clone() for p in params]


@pytest.mark.parametrize("name", BUILD)
def test_known_optimizers_of_exactly_their_type_are_fused_unless_the_backend_is_the_oracle(
    name: str,
) -> None:
    kind = type(BUILD[name](weights())).__name__
    assert kind.lower() == name
    assert shown(wrap(BUILD[name](weights()))) == [f"fused: {kind}"]
    assert shown(wrap(BUILD[name](weights()), "fused", "reference")) == [f"fused: {kind}"]
    (general,) = wrap(BUILD[name](weights()), "auto", "reference").path
    assert general.path == "general"
    assert "reference backend" in general.reason
    assert shown(wrap(BUILD[name](weights()), "general")) == ["general: it was asked for"]


@pytest.mark.parametrize("kind", FUSABLE, ids=lambda kind: kind.__name__)
def test_a_subclass_may_step_otherwise_and_takes_the_general_path(kind: Any) -> None:
    changed = type("Changed", (kind,), {})
    assert shown(wrap(changed(weights(), lr=0.1))) == ["general: no fused update for Changed"]
    with pytest.raises(ArgumentError, match=r"^path: expected a step that can be fused, got param"):
        wrap(changed(weights(), lr=0.1), "fused")


def hooked(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def pre_hooked(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


def replaced(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.step = lambda: None  # type: ignore[method-assign]
    return optimizer


def with_gaps() -> nn.Parameter:
    return nn.Parameter(torch.zeros(12).half()[::2])


def expanded() -> nn.Parameter:
    return nn.Parameter(torch.zeros(1).expand(4))


DECLINED: dict[str, tuple[Any, str]] = {
    "foreach": (lambda: BUILD["adamw"](weights(), foreach=True), "foreach=True asks"),
    "no foreach": (lambda: BUILD["sgd"](weights(), foreach=False), "foreach=False asks"),
    "beta": (
        lambda: torch.optim.AdamW([{"params": weights(), "betas": (torch.tensor(0.9), 0.9)}]),
        "betas is a tensor",
    ),
    "beta in a list": (
        lambda: torch.optim.AdamW([{"params": weights(), "betas": [torch.tensor(0.9), 0.9]}]),
        "betas is a tensor",
    ),
    "decay": (
        lambda: torch.optim.SGD([{"params": weights(), "weight_decay": torch.tensor(0.1)}], lr=0.1),
        "weight_decay is a tensor",
    ),
    "float64 lr": (
        lambda: torch.optim.SGD(weights(), lr=torch.tensor(0.1, dtype=torch.float64)),
        "lr is a tensor of torch.float64",
    ),
    "hook": (lambda: hooked(BUILD["sgd"](weights())), "has step hooks"),
    "hook before": (lambda: pre_hooked(BUILD["sgd"](weights())), "has step hooks"),
    "step": (lambda: replaced(BUILD["sgd"](weights())), "step was replaced"),
    "float64": (lambda: BUILD["adam"](weights(torch.float64)), "a parameter is float64"),
    "gaps": (lambda: BUILD["adam"]([*weights(), with_gaps()]), "gaps in memory"),
    "overlap": (lambda: BUILD["adam"]([*weights(), expanded()]), "overlaps itself"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_cannot_be_fused_says_why_and_is_refused_if_it_was_asked_for(case: str) -> None:
    build, reason = DECLINED[case]
    (path,) = wrap(build()).path
    assert path.path == "general"
    assert reason in path.reason
    assert reason in repr(wrap(build()))
    message = r"^path: expected a step that can be fused, got param group 0: .*Pass path=\"auto\""
    with pytest.raises(ArgumentError, match=message) as raised:
        wrap(build(), "fused")
    assert reason in str(raised.value)


def test_a_group_that_cannot_be_fused_leaves_the_others_where_they_are() -> None:
    groups = [{"params": weights()}, {"params": weights(), "foreach": True}]
    first, second = shown(wrap(torch.optim.AdamW(groups)))
    assert first == "fused: AdamW"
    assert second.startswith("general: foreach=True")


def test_a_transposed_parameter_and_a_scheduler_do_not_stop_it() -> None:
    turned = nn.Parameter(torch.zeros(3, 5).half().t())
    inner = BUILD["sgd"]([turned, nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(()))])
    torch.optim.lr_scheduler.StepLR(inner, 1)
    optimizer = wrap(inner)
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    assert shown(optimizer) == ["fused: SGD"]


def test_a_tensor_that_a_scheduler_keeps_in_a_group_is_no_option() -> None:
    optimizer = wrap(torch.optim.SGD(weights(), lr=torch.tensor(0.1)))
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert isinstance(optimizer.param_groups[0]["initial_lr"], torch.Tensor)
    assert shown(optimizer) == ["fused: SGD"]


def test_groups_that_join_later_are_looked_at() -> None:
    optimizer = wrap(BUILD["adamw"](weights()))
    train(optimizer, 2)
    optimizer.add_param_group({"params": weights(torch.float64)})
    assert [path.path for path in optimizer.path] == ["fused", "general"]
    train(optimizer, 2)
    asked = wrap(BUILD["adamw"](weights()), "fused")
    asked.add_param_group({"params": weights(), "foreach": True})
    with pytest.raises(ArgumentError, match="param group 1: foreach=True"):
        train(asked, 1)


@pytest.mark.parametrize("engine", FUSED, ids=str)
@pytest.mark.parametrize("name", BUILD)
def test_training_that_leaves_the_fused_path_and_returns_continues_with_its_state(
    name: str, engine: Engine
) -> None:
    """Against one that stays on the general path: three stretches, the middle one general too."""
    params, others = weights(), weights()
    changing = wrap(BUILD[name](params), "auto", "cpu")
    general = wrap(BUILD[name](others), "general", engine.backend)
    kinds = []
    for stretch in range(3):
        handle = changing.inner.register_step_post_hook(lambda *_: None) if stretch == 1 else None
        for optimizer in (changing, general):
            train(optimizer, 4, seed=stretch)
        kinds.append(changing.path[0].path)
        if handle is not None:
            handle.remove()
        for mine, theirs in zip(masters(changing), masters(general), strict=True):
            assert engine.agree(mine, theirs, steps=4 * (stretch + 1), lr=0.1)
    assert kinds == ["fused", "general", "fused"]
    for param, other in zip(params, others, strict=True):
        mine, theirs = changing.state[param], general.state[other]
        assert set(theirs) <= set(mine)
        for key in theirs.keys() - {"master"}:
            assert engine.agree(mine[key].float(), theirs[key].float(), steps=12, lr=1.0), key
        if name not in ("lion", "sgd"):  # whose steps on the general path count nothing
            assert mine["step"] == 12


@pytest.mark.parametrize("engine", FUSED, ids=str)
def test_an_option_that_asks_for_another_moment_in_mid_training_gets_it(engine: Engine) -> None:
    params, others = weights(), weights()
    optimizer = engine.wrap(torch.optim.SGD(params, lr=0.1), SCALE)
    plain = wrap(torch.optim.SGD(others, lr=0.1), "general")
    for one in (optimizer, plain):
        train(one, 2)
        one.param_groups[0]["momentum"] = 0.5
        train(one, 3, seed=1)
    for mine, theirs in zip(masters(optimizer), masters(plain), strict=True):
        assert engine.agree(mine, theirs, steps=5)
    assert all("momentum_buffer" in optimizer.state[param] for param in params)
