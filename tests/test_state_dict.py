"""state_dict and load_state_dict: every field comes back bit for bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import mpcore
import pytest
import torch
from mpcore.errors import StageError
from torch import Tensor, nn

from mpcore_testing.checkpoints import INNERS, SCALE, contents, make, patterns, train
from mpcore_testing.engines import Engine, engine_cases
from mpcore_testing.lengths import each_in_turn


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


STOPS = [0, 3, 4, 6, 9]  # fresh, plain, a growth, an overflow, later


@pytest.mark.parametrize(("name", "engine", "steps"), each_in_turn(engine_cases(INNERS), STOPS))
def test_training_resumed_from_a_file_equals_training_that_never_stopped(
    engine: Engine, name: str, steps: int
) -> None:
    model, optimizer = make(engine, name)
    train(model, optimizer, 0, steps)
    optimizer.param_groups[0].update(lr=optimizer.param_groups[0]["lr"] / 2)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, other = make(engine, name, seed=1)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert contents(resumed, other) == contents(model, optimizer)
    train(model, optimizer, steps, steps + 6)
    train(resumed, other, steps, steps + 6)
    assert contents(resumed, other) == contents(model, optimizer)
    assert (other.skipped_steps, other.steps) == (1, steps + 6)


@pytest.mark.parametrize(("name", "engine"), engine_cases(INNERS))
def test_masters_and_moments_of_16_bit_weights_are_saved_and_loaded_in_float32(
    engine: Engine, name: str
) -> None:
    model, optimizer = make(engine, name)
    train(model, optimizer, 0, 3)
    saved = optimizer.state_dict()
    resumed, other = make(engine, name)
    other.load_state_dict(saved)
    for number, param in enumerate(model.parameters()):
        floating = [v for v in saved["state"].get(number, {}).values() if isinstance(v, Tensor)]
        wide = torch.promote_types(param.dtype, torch.float32)
        if param.requires_grad:
            assert {v.dtype for v in floating} <= {wide, torch.float32}
        assert ("master" in saved["state"].get(number, {})) == (
            param.element_size() == 2 and param.requires_grad
        )
    master = other.state[resumed.low.weight]["master"]
    assert patterns(master) == patterns(optimizer.state[model.low.weight]["master"])
    assert not torch.equal(master, master.half().float()), "the master carries nothing extra"


def test_a_state_dict_holds_plain_values_only(engine: Engine) -> None:
    model, optimizer = make(engine, "AdamW")
    train(model, optimizer, 0, 6)
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups", "mpcore"}
    numbers = saved["mpcore"]["loss_scale"]
    assert {type(value) for value in numbers.values()} <= {int, float}
    assert (numbers["scale"], numbers["steps"], numbers["skipped_steps"]) == (256.0, 6, 1)


@pytest.mark.parametrize(("name", "engine"), engine_cases(INNERS, ["AdamW", "RMSprop"]))
def test_loading_shares_no_tensor_with_what_was_loaded_and_leaves_it_alone(
    engine: Engine, name: str
) -> None:
    model, optimizer = make(engine, name)
    train(model, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    before = patterns(saved)
    resumed, other = make(engine, name)
    _, third = make(engine, name)
    other.load_state_dict(saved)
    third.load_state_dict(saved)
    resumed.load_state_dict(model.state_dict())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(other, 0.5)  # fills a tensor lr in place
    train(resumed, other, 3, 5)
    scheduler.step()
    assert patterns(saved) == before
    assert patterns(third.state_dict()) == before


@pytest.mark.parametrize("target", ["wrapper", "inner"])
@pytest.mark.parametrize("early", [True, False])
def test_schedulers_drive_the_step_after_loading_whenever_they_were_built(
    engine: Engine, target: str, early: bool
) -> None:
    model, optimizer = make(engine, "SGD")
    train(model, optimizer, 0, 3)
    saved = optimizer.state_dict()
    resumed, other = make(engine, "SGD")
    resumed.load_state_dict(model.state_dict())

    def build() -> Any:
        chosen = other if target == "wrapper" else other.inner
        return torch.optim.lr_scheduler.LambdaLR(chosen, lambda epoch: 0.0 if epoch else 1.0)

    scheduler = build() if early else None
    other.load_state_dict(saved)
    scheduler = scheduler or build()
    assert other.param_groups is other.inner.param_groups
    train(resumed, other, 3, 4)
    train(model, optimizer, 3, 4)
    assert patterns(resumed.low.weight) == patterns(model.low.weight)
    scheduler.step()
    before = patterns(resumed.state_dict())
    train(resumed, other, 4, 5)
    assert patterns(resumed.state_dict()) == before
    assert other.param_groups[0]["lr"] == 0.0


def test_hooks_around_saving_and_loading_run_and_may_replace_what_passes(engine: Engine) -> None:
    model, optimizer = make(engine)
    train(model, optimizer, 0, 2)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "note": "hello"})
    optimizer.register_load_state_dict_pre_hook(lambda o, given: given["wrapped"])
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(f"loaded {o.steps}"))
    saved = optimizer.state_dict()
    assert saved["note"] == "hello"
    train(model, optimizer, 2, 3)
    optimizer.load_state_dict({"wrapped": saved})
    assert seen[:1] == ["saving"]
    assert seen[-1] == "loaded 2"


def test_a_hook_after_saving_sees_all_that_is_saved(engine: Engine) -> None:
    _, optimizer = make(engine)
    seen: list[set[str]] = []
    optimizer.register_state_dict_post_hook(lambda o, saved: seen.append(set(saved)))
    optimizer.state_dict()
    assert seen == [{"state", "param_groups", "mpcore"}]


@pytest.mark.parametrize("scale", [mpcore.NoLossScale(), mpcore.StaticLossScale(64.0)])
def test_a_scale_that_never_moves_keeps_its_value_whatever_is_loaded(
    engine: Engine, scale: Any
) -> None:
    source_model, source = make(engine, "SGD without state")
    train(source_model, source, 0, 7)
    model, optimizer = make(engine, "SGD without state", scale)
    expected = optimizer.loss_scale
    optimizer.load_state_dict(source.state_dict())
    model.load_state_dict(source_model.state_dict())
    assert optimizer.loss_scale == expected
    assert (optimizer.steps, optimizer.skipped_steps) == (7, 1)
    before = model.single.bias.detach().clone()
    optimizer.backward(model.single.bias.sum())
    optimizer.step()
    assert torch.equal(model.single.bias, before - 0.05)


def test_a_saved_scale_outside_the_bounds_is_clamped_to_them(engine: Engine) -> None:
    _, source = make(engine, "SGD", mpcore.DynamicLossScale(init=2.0**10))
    for bounds, expected in (((1.0, 2.0**8), 2.0**8), ((2.0**12, 2.0**20), 2.0**12)):
        scale = mpcore.DynamicLossScale(expected, min_scale=bounds[0], max_scale=bounds[1])
        _, optimizer = make(engine, "SGD", scale)
        optimizer.load_state_dict(source.state_dict())
        assert optimizer.loss_scale == expected


def test_a_saved_tolerance_of_overflows_is_cut_to_the_hysteresis_of_now(engine: Engine) -> None:
    _, source = make(engine, "SGD", mpcore.DynamicLossScale(init=2.0**8, hysteresis=4))
    model, optimizer = make(engine, "SGD")
    optimizer.load_state_dict(source.state_dict())
    train(model, optimizer, 5, 6)
    assert (optimizer.skipped_steps, optimizer.loss_scale) == (1, 2.0**7)


def test_loading_between_backward_and_step_forgets_that_the_gradients_were_scaled(
    engine: Engine,
) -> None:
    model, optimizer = make(engine)
    train(model, optimizer, 0, 4)
    saved = optimizer.state_dict()
    train(model, optimizer, 4, 9)
    assert optimizer.loss_scale != saved["mpcore"]["loss_scale"]["scale"]
    optimizer.zero_grad()
    optimizer.backward(model(torch.ones(2, 3)).sum())
    optimizer.load_state_dict(saved)
    with pytest.raises(StageError, match="expected gradients of a scaled loss"):
        optimizer.step()


def test_loading_a_state_dict_from_before_training_takes_masters_from_the_weights_again(
    engine: Engine,
) -> None:
    _, fresh = make(engine, "SGD")
    model, optimizer = make(engine, "SGD")
    train(model, optimizer, 0, 4)
    with torch.no_grad():
        model.low.weight.fill_(0.25)
    optimizer.load_state_dict(fresh.state_dict())
    assert (len(optimizer.state), len(optimizer.inner.state), optimizer.steps) == (0, 0, 0)
    optimizer.zero_grad()
    optimizer.backward(model.low.weight.float().sum())
    optimizer.step()
    master = optimizer.state[model.low.weight]["master"]
    assert torch.equal(master, torch.full((4, 3), 0.25) - 0.05)


def test_the_number_of_saturated_weights_is_saved_and_loaded(engine: Engine) -> None:
    param, other = (nn.Parameter(torch.full((5,), 65504.0).half()) for _ in range(2))
    optimizer, resumed = (
        engine.wrap(torch.optim.SGD([p], lr=100.0), SCALE) for p in (param, other)
    )
    optimizer.backward(-param.float().sum())
    optimizer.step()
    assert optimizer.saturated == 5
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert resumed.saturated == 5


def test_a_file_from_before_there_were_peaks_is_loaded(engine: Engine) -> None:
    weight = torch.nn.Parameter(torch.ones(2).half())
    optimizer = engine.wrap(torch.optim.SGD([weight], lr=0.5))
    saved = optimizer.state_dict()
    old = {k: v for k, v in saved["mpcore"]["loss_scale"].items() if not k.startswith("peak")}
    optimizer.load_state_dict({**saved, "mpcore": {**saved["mpcore"], "loss_scale": old}})
    assert optimizer.state_dict()["mpcore"] == saved["mpcore"]
