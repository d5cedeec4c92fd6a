"""A state_dict that does not fit is refused with one clear error, and nothing changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mpcore.errors import ArgumentError, ArgumentTypeError

from mpcore_testing.checkpoints import INNERS, SCALE, Pair, contents, make, train
from mpcore_testing.engines import Engine


def without(saved: Any, *path: Any) -> Any:
    for key in path[:-1]:
        saved = saved[key]
    del saved[path[-1]]


def put(saved: Any, value: Any, *path: Any) -> Any:
    for key in path[:-1]:
        saved = saved[key]
    saved[path[-1]] = value


SCALE_KEY = ("mpcore", "loss_scale", "scale")
BROKEN: dict[str, Any] = {
    "no mpcore": lambda d: [without(part, "mpcore") for part in (d, *d["param_groups"])],
    "newer version": lambda d: put(d, 2, "mpcore", "version"),
    "no state": lambda d: without(d, "state"),
    "no groups": lambda d: without(d, "param_groups"),
    "no loss scale": lambda d: without(d, "mpcore", "loss_scale"),
    "half a loss scale": lambda d: without(d, "mpcore", "loss_scale", "steps"),
    "no count": lambda d: without(d, "mpcore", "saturated"),
    "a group more": lambda d: d["param_groups"].append(d["param_groups"][0]),
    "a weight less": lambda d: d["param_groups"][0]["params"].pop(),
    "master's shape": lambda d: put(d, torch.ones(3, 4), "state", 1, "master"),
    "last master's shape": lambda d: put(d, torch.ones(4), "state", 4, "master"),
    "master's dtype": lambda d: put(d, torch.ones(4, 3).half(), "state", 1, "master"),
    "no tensor": lambda d: put(d, [1.0], "state", 1, "master"),
    **{
        f"scale {value!r}": lambda d, value=value: put(d, value, *SCALE_KEY)
        for value in (0.0, -2.0, 3.0, float("nan"), float("inf"), 2.0**127, "256", None)
    },
    "negative tracker": lambda d: put(d, -1, "mpcore", "loss_scale", "growth_tracker"),
    "tracker beyond int32": lambda d: put(d, 2**31, "mpcore", "loss_scale", "growth_tracker"),
    "steps beyond int64": lambda d: put(d, 2**63, "mpcore", "loss_scale", "steps"),
    "count beyond int64": lambda d: put(d, 2**63, "mpcore", "saturated"),
    "text for steps": lambda d: put(d, "4", "mpcore", "loss_scale", "steps"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_state_dict_that_does_not_fit_is_refused_and_nothing_changes(
    engine: Engine, case: str
) -> None:
    model, optimizer = make(engine)
    train(model, optimizer, 0, 3)
    before = contents(model, optimizer)
    source_model, source = make(engine, seed=1)
    train(source_model, source, 0, 4)
    broken = copy.deepcopy(source.state_dict())
    BROKEN[case](broken)
    with pytest.raises((ArgumentError, ArgumentTypeError), match=r"^state_dict.*: expected .*"):
        optimizer.load_state_dict(broken)
    assert contents(model, optimizer) == before
    train(model, optimizer, 3, 4)


def test_masters_of_a_16_bit_model_are_not_loaded_into_float32_weights(engine: Engine) -> None:
    source_model, source = make(engine)
    train(source_model, source, 0, 3)
    model = Pair().float()
    optimizer = engine.wrap(INNERS["AdamW"](model.parameters()), SCALE)
    before = contents(model, optimizer)
    with pytest.raises(ArgumentError, match=r"^state_dict.*master.*: expected"):
        optimizer.load_state_dict(source.state_dict())
    assert contents(model, optimizer) == before
