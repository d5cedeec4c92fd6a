"""Settings that torch.amp.GradScaler takes: ours takes them too, within bounds after a warning."""

from __future__ import annotations

import math
import warnings
from typing import Any

import mpcore
import pytest
import torch
from mpcore.backends import reference

from mpcore_testing.scalers import train, weight

THEIRS, OURS = torch.amp.GradScaler, mpcore.GradScaler
INF = math.inf
NEVER = 2**31 - 1
#: option, what torch takes, what we use instead; None: the same, without a warning
SETTINGS = [
    ("init_scale", 1e38, 2.0**126),
    ("init_scale", INF, 2.0**126),
    ("init_scale", 0.0, 2.0**-126),
    ("init_scale", -3, 2.0**-126),
    ("init_scale", 3, None),
    ("growth_factor", INF, 1.0),
    ("growth_factor", 1e300, 1.0),
    ("growth_factor", 1e30, None),
    ("backoff_factor", 0.0, 2.0**-126),
    ("backoff_factor", -1.0, 2.0**-126),
    ("growth_interval", 0, NEVER),
    ("growth_interval", -7, NEVER),
    ("growth_interval", 2**40, None),
]
#: what torch's constructor refuses, and its setters and checkpoints take
LATE = [
    ("growth_factor", 1.0, None),
    ("growth_factor", 0.5, 1.0),
    ("backoff_factor", 1.0, None),
    ("backoff_factor", 2.0, 1.0),
]


def used(scaler: Any, name: str) -> Any:
    return scaler.get_scale() if name == "init_scale" else getattr(scaler, f"get_{name}")()


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def check(scaler: Any, caught: Any, name: str, given: float, expected: float | None) -> None:
    assert used(scaler, name) == (given if expected is None else expected)
    messages = told(caught)
    assert len(messages) == (expected is not None)
    if expected is not None:
        assert f"{given!r} is used as {expected:g}" in messages[0]


@pytest.mark.parametrize(("name", "given", "expected"), SETTINGS)
def test_what_torchs_constructor_takes_is_taken(
    name: str, given: float, expected: float | None
) -> None:
    THEIRS("cpu", **{name: given})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scaler = OURS("cpu", **{name: given})
    check(scaler, caught, name, given, expected)


@pytest.mark.parametrize(
    ("name", "given", "expected"), [case for case in SETTINGS if case[0] != "init_scale"] + LATE
)
def test_what_torchs_setters_take_is_taken(name: str, given: float, expected: float | None) -> None:
    scaler = OURS("cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind in (THEIRS("cpu"), scaler):
            getattr(kind, f"set_{name}")(given)
    check(scaler, caught, name, given, expected)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(("name", "given", "expected"), SETTINGS + LATE)
def test_what_torchs_checkpoints_hold_is_taken(
    name: str, given: float, expected: float | None, started: bool
) -> None:
    key = "scale" if name == "init_scale" else name
    state = THEIRS("cpu").state_dict() | {key: given, "_growth_tracker": 5}
    scaler = OURS("cpu")
    if started:
        train(scaler, torch.optim.SGD([param := weight(2)], lr=0.1), param, [1.0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scaler.load_state_dict(state)
    check(scaler, caught, name, given, expected)
    assert scaler._get_growth_tracker() == 5
    THEIRS("cpu").load_state_dict(scaler.state_dict())


def test_the_largest_tracker_of_a_checkpoint_can_be_counted_up() -> None:
    """torch's tracker is an int32, too: one more would be negative, and the scale never grow."""
    scaler, param = OURS("cpu", init_scale=4.0), weight(2)
    scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 2**31 - 1})
    train(scaler, torch.optim.SGD([param], lr=0.1), param, [1.0])
    assert scaler.get_scale() == 8.0


def test_one_warning_tells_of_everything() -> None:
    state = {
        "scale": 0.0,
        "growth_factor": INF,
        "backoff_factor": 0.0,
        "growth_interval": 0,
        "_growth_tracker": -1,
    }
    scaler = OURS("cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scaler.load_state_dict(state)
    (message,) = told(caught)
    for name in ("scale", "growth factor", "backoff factor", "growth interval", "growth tracker"):
        assert f"the {name} " in message
    assert scaler._get_growth_tracker() == 0


def test_a_warning_that_is_an_error_changes_nothing() -> None:
    scaler = OURS("cpu")
    before = scaler.state_dict()
    calls = [
        lambda: scaler.load_state_dict({**before, "scale": 0.0}),
        lambda: scaler.set_growth_factor(0.5),
        lambda: scaler.set_backoff_factor(2.0),
        lambda: scaler.set_growth_interval(0),
    ]
    for call in calls:
        with pytest.raises(UserWarning, match="is used as"):  # warnings are errors in these tests
            call()
        assert scaler.state_dict() == before


@pytest.mark.filterwarnings("ignore:GradScaler. the")
@pytest.mark.parametrize(
    ("options", "history", "scales"),
    [
        ({"growth_factor": 1.0}, [1, 1, INF, 1], [8, 8, 4, 4]),
        ({"growth_factor": 0.5}, [1, 1], [8, 8]),
        ({"growth_factor": INF}, [1, 1], [8, 8]),
        ({"growth_factor": 1e30, "init_scale": 2.0**100}, [1, 1], [2.0**126] * 2),
        ({"backoff_factor": 1.0}, [1, INF, INF], [16, 16, 16]),
        ({"backoff_factor": 0.0}, [INF, 1], [1, 2]),
        ({"growth_interval": 0}, [1, 1, INF, 1], [8, 8, 4, 4]),
        ({"init_scale": 1e38}, [1, INF, 1], [2.0**126, 2.0**125, 2.0**126]),
    ],
)
def test_training_goes_on_with_them(
    options: dict[str, float], history: list[float], scales: list[float]
) -> None:
    scaler = OURS("cpu", min_scale=1.0)
    options = {"growth_interval": 1, **options}
    start = {"scale": options.pop("init_scale", 8.0)}
    scaler.load_state_dict({**THEIRS("cpu").state_dict(), **start, **options})
    param = weight(2)
    optimizer, got = torch.optim.SGD([param], lr=0.0), []
    for factor in history:
        train(scaler, optimizer, param, [factor])
        got.append(scaler.get_scale())
    assert got == scales
    assert param.isfinite().all()


@pytest.mark.parametrize("name", ["growth_factor", "backoff_factor"])
def test_kernels_are_not_asked_for_factors_that_they_refuse(name: str) -> None:
    """They take factors that are float32 and move a scale."""
    scaler = OURS("cpu")
    assert scaler._backend_for(torch.device("cpu")) is not reference
    getattr(scaler, f"set_{name}")(1.0)
    assert scaler._backend_for(torch.device("cpu")) is reference
