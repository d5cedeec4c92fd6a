"""mpcore.GradScaler beside torch.amp.GradScaler: the same loops, texts, files."""

from __future__ import annotations

import math
import pickle
from typing import Any

import mpcore
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

THEIRS, OURS = torch.amp.GradScaler, mpcore.GradScaler
BUILD: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, fused=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}
INF = float("inf")


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(3,), (2, 5), ()]]


def loss_of(params: list[nn.Parameter], step: int, factor: float = 1.0) -> torch.Tensor:
    noise = torch.Generator().manual_seed(100 + step)
    terms = [(p * torch.randn(p.shape, generator=noise)).sum() for p in params]
    return torch.stack(terms).sum() * factor


def run(
    kind: Any, name: str, history: list[bool], unscale: bool, clip: bool, **options: Any
) -> tuple[Any, ...]:
    params = parameters()
    optimizer = BUILD[name](params)
    scaler = kind("cpu", **options)
    scales = []
    for step, bad in enumerate(history):
        optimizer.zero_grad()
        scaler.scale(loss_of(params, step, INF if bad else 1.0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            if clip:
                torch.nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(optimizer)
        scaler.update()
        scales.append((scaler.get_scale(), scaler._get_growth_tracker()))
    state = [optimizer.state[p] for p in params]
    return scales, params, [{k: v for k, v in s.items() if v is not None} for s in state]


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize(("unscale", "clip"), [(False, False), (True, False), (True, True)])
@given(
    history=st.lists(st.sampled_from([False, False, True]), max_size=10),
    init=st.sampled_from([2.0**16, 3.0, 1000.0, 0.8]),
    growth=st.sampled_from([2.0, 1.5, 7.0]),
    backoff=st.sampled_from([0.5, 0.8]),
    interval=st.integers(1, 4),
)
def test_a_loop_has_the_bits_of_torchs(
    name: str,
    unscale: bool,
    clip: bool,
    history: list[bool],
    init: float,
    growth: float,
    backoff: float,
    interval: int,
) -> None:
    options = {
        "init_scale": init,
        "growth_factor": growth,
        "backoff_factor": backoff,
        "growth_interval": interval,
    }
    # torch's fused SGD takes a velocity from memory that nobody has written to if its first step is
    # skipped, whoever skips it
    history = [False, *history] if name == "SGD fused" else history
    ours, theirs = (run(kind, name, history, unscale, clip, **options) for kind in (OURS, THEIRS))
    assert ours[0] == theirs[0]
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ours[2], theirs[2], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


# each is a course of calls that torch refuses at its last one
def _unscaled_twice(scaler: Any, optimizer: Any, params: Any) -> None:
    scaler.scale(loss_of(params, 0)).backward()
    scaler.unscale_(optimizer)
    scaler.unscale_(optimizer)


def _unscaled_after_step(scaler: Any, optimizer: Any, params: Any) -> None:
    scaler.scale(loss_of(params, 0)).backward()
    scaler.step(optimizer)
    scaler.unscale_(optimizer)


def _stepped_twice(scaler: Any, optimizer: Any, params: Any) -> None:
    scaler.scale(loss_of(params, 0)).backward()
    scaler.step(optimizer)
    scaler.step(optimizer)


def _no_gradient(scaler: Any, optimizer: Any, params: Any) -> None:
    scaler.scale(loss_of(params, 0))
    scaler.step(optimizer)


def _closure(scaler: Any, optimizer: Any, params: Any) -> None:
    scaler.scale(loss_of(params, 0)).backward()
    scaler.step(optimizer, closure=lambda: 0.0)


def _no_check(scaler: Any, optimizer: Any, params: Any) -> None:
    scaler.scale(loss_of(params, 0))
    scaler.update()


def _pickled_midway(scaler: Any, optimizer: Any, params: Any) -> None:
    scaler.scale(loss_of(params, 0)).backward()
    scaler.unscale_(optimizer)
    pickle.dumps(scaler)


def _wide_new_scale(scaler: Any, optimizer: Any, params: Any) -> None:
    scaler.scale(loss_of(params, 0))
    scaler.update(torch.ones(2))


def _new_scale_with_grad(scaler: Any, optimizer: Any, params: Any) -> None:
    scaler.scale(loss_of(params, 0))
    scaler.update(torch.ones(1, requires_grad=True))


MISUSES = {
    "unscale_ first": lambda scaler, optimizer, params: scaler.unscale_(optimizer),
    "step first": lambda scaler, optimizer, params: scaler.step(optimizer),
    "update first": lambda scaler, optimizer, params: scaler.update(),
    "unscale_ twice": _unscaled_twice,
    "unscale_ after step": _unscaled_after_step,
    "step twice": _stepped_twice,
    "no gradient": _no_gradient,
    "closure": _closure,
    "no check": _no_check,
    "pickled midway": _pickled_midway,
    "wide new scale": _wide_new_scale,
    "new scale with grad": _new_scale_with_grad,
    "no tensor": lambda scaler, optimizer, params: scaler.scale(1.0),
    "no tensor inside": lambda scaler, optimizer, params: scaler.scale([1.0]),
    "empty state": lambda scaler, optimizer, params: scaler.load_state_dict({}),
    "partial state": lambda scaler, optimizer, params: scaler.load_state_dict({"scale": 2.0}),
}


def _raised(kind: Any, misuse: str, name: str) -> tuple[type, str]:
    params = parameters()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - compared below
        MISUSES[misuse](kind("cpu"), BUILD[name](params), params)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("misuse", MISUSES)
@pytest.mark.parametrize("name", ["SGD", "Adam fused"])
def test_what_torch_refuses_is_refused_in_the_same_words(misuse: str, name: str) -> None:
    if (misuse, name) == ("no gradient", "Adam fused"):
        pytest.skip("torch steps a fused optimizer that has no gradient")
    ours, theirs = _raised(OURS, misuse, name), _raised(THEIRS, misuse, name)
    if misuse == "partial state":
        ours, theirs = (ours[0], ""), (theirs[0], "")  # another key may be missed first
    assert ours == theirs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"growth_factor": 1.0}, "The growth factor must be > 1.0."),
        ({"backoff_factor": 1.0}, "The backoff factor must be < 1.0."),
        ({"growth_factor": math.nan}, "growth factor must be a number, got NaN"),
        ({"backoff_factor": math.nan}, "backoff factor must be a number, got NaN"),
        ({"growth_interval": 2.5}, "growth interval must be an integer, got 2.5"),
        ({"growth_interval": True}, "growth interval must be an integer, got True"),
        ({"init_scale": math.nan}, "init_scale must be a number, got NaN"),
        ({"min_scale": 0.0}, r"2\*\*-126 <= min_scale"),
        ({"max_scale": 2.0**127}, r"max_scale <= 2\*\*126"),
        ({"hysteresis": 0}, "hysteresis must be an integer >= 1"),
        ({"refill": "never"}, "refill must be one of growth, clean"),
    ],
)
def test_impossible_numbers_raise_what_torch_raises(options: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        OURS("cpu", **options)
    OURS("cpu", enabled=False, **options)  # torch does not look then either


def test_setters_change_the_course_and_refuse_what_would_break_it() -> None:
    scaler = OURS("cpu")
    scaler.set_growth_factor(3.0)
    scaler.set_backoff_factor(0.25)
    scaler.set_growth_interval(5)
    got = (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval())
    assert got == (3.0, 0.25, 5)
    for setter in ("growth_factor", "backoff_factor", "growth_interval"):
        with pytest.raises(AssertionError, match=setter.replace("_", " ")):
            getattr(scaler, f"set_{setter}")(math.nan)
    assert got == (3.0, 0.25, 5)


def test_a_disabled_scaler_does_nothing() -> None:
    params = parameters()
    scaler, optimizer, loss = OURS("cpu", enabled=False), BUILD["SGD"](params), loss_of(params, 0)
    assert scaler.scale(loss) is loss
    loss.backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert (scaler.get_scale(), scaler.is_enabled(), scaler.state_dict()) == (1.0, False, {})
    assert (scaler.steps, scaler.skipped_steps, scaler.last_step) == (0, 0, None)
    scaler.load_state_dict({})
    pickle.loads(pickle.dumps(scaler))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_scaler_for_cuda_is_disabled_with_torchs_warning() -> None:
    with pytest.warns(UserWarning, match="CUDA is not available.  Disabling"):
        assert not OURS().is_enabled()


def test_it_is_one_of_torchs_and_takes_its_arguments_in_their_order() -> None:
    scaler = OURS("cpu", 8.0, 3.0, 0.25, 7, True)
    assert isinstance(scaler, THEIRS)
    theirs = THEIRS("cpu", 8.0, 3.0, 0.25, 7, True).state_dict()
    assert theirs.items() <= scaler.state_dict().items()


def test_outputs_of_every_kind_are_scaled() -> None:
    scaler = OURS("cpu", init_scale=2.0**17)
    one = torch.ones(())
    assert scaler.scale(one).item() == 2.0**17
    assert [t.item() for t in scaler.scale([one, one * 2])] == [2.0**17, 2.0**18]
    nested = scaler.scale((one, [one]))
    assert (type(nested), type(nested[1])) == (tuple, list)
    lazy = scaler.scale(t for t in (one, one))
    assert [t.item() for t in lazy] == [2.0**17] * 2
    # where torch's result is infinite
    halves = scaler.scale(torch.ones(1).half())
    assert (halves.dtype, halves.item()) == (torch.float32, 2.0**17)


class OfUnusualMake:
    """An optimizer without a hash, that cannot be referred to weakly."""

    __slots__ = ("param_groups", "stepped")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, params: list[Any]) -> None:
        self.param_groups, self.stepped = [{"params": params}], 0

    def __eq__(self, other: object) -> bool:
        return True

    def step(self) -> None:
        self.stepped += 1


def test_an_optimizer_of_unusual_make_is_stepped_and_has_its_result() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in "ab"]
    optimizers = [OfUnusualMake([param]) for param in params]
    scaler = mpcore.GradScaler("cpu")
    scaler.scale(params[0].sum() + params[1].sum() * math.inf).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert [optimizer.stepped for optimizer in optimizers] == [1, 0]
    results = [scaler.last_step_of(optimizer) for optimizer in optimizers]
    assert [result.skipped for result in results] == [False, True]


def test_a_check_that_no_step_used_is_forgotten_with_the_iteration() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    for new_scale in (None, 8.0):
        scaler = mpcore.GradScaler("cpu")
        scaler.scale(param.sum()).backward()
        scaler.unscale_(optimizer)
        scaler.update(new_scale)
        assert not scaler._checks
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    del optimizer
    scaler.update(4.0)
    assert not scaler._last
