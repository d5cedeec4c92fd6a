"""`compile` and `fit` of Keras 3 on its torch backend, with loss scales of ours."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mpcore
import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.trainers,
    # Keras's own, on NumPy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]
os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "torch":
    pytest.skip("Keras has another backend", allow_module_level=True)

from mpcore.integrations.keras import LossScaleOptimizer  # noqa: E402

#: What Keras does, within our bounds.
SCALING = mpcore.DynamicLossScale(
    2.0**10, growth_interval=3, min_scale=2.0**-126, max_scale=2.0**126
)
OVERFLOWS = (0, 4, 5)


@pytest.fixture(autouse=True)
def policy() -> Any:
    """The policy is global."""
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


def build(optimizer: Any, policy: str = "mixed_float16") -> Any:
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.layers.Input((6,)), keras.layers.Dense(16, "gelu"), keras.layers.Dense(3)]
    )
    model.compile(optimizer=optimizer, loss="mse")
    return model


def adamw() -> Any:
    return keras.optimizers.AdamW(3e-3, global_clipnorm=0.5)


def data(batches: int = 12, overflows: Any = OVERFLOWS) -> Any:
    draw = np.random.default_rng(1)
    x = draw.standard_normal((batches * 4, 6)).astype(np.float32)
    y = x[:, :3].copy()
    for batch in overflows:
        x[4 * batch] = 1e9  # infinite in float16
    return x, y


def fit(model: Any, x: Any, y: Any) -> Any:
    model.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
    return model


def weights(model: Any) -> list[Any]:
    return [v.numpy() for v in model.trainable_variables]


def test_fit_has_the_bits_of_kerass_own_where_its_scale_is_within_our_bounds() -> None:
    theirs = keras.optimizers.LossScaleOptimizer(
        adamw(), initial_scale=2.0**10, dynamic_growth_steps=3
    )
    ours = LossScaleOptimizer(adamw(), SCALING)
    mine, other = fit(build(ours), *data()), fit(build(theirs), *data())
    assert mine.optimizer is ours, "compile has put another one around it"
    for a, b in zip(weights(mine), weights(other), strict=True):
        assert np.array_equal(a, b)
    assert ours.loss_scale == float(theirs.dynamic_scale) == float(ours.dynamic_scale)
    assert (ours.steps, ours.skipped_steps) == (12, len(OVERFLOWS))
    assert int(ours.iterations) == 12 - len(OVERFLOWS)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float32"])
def test_no_loss_scale_is_the_wrapped_optimizer(policy: str) -> None:
    ours = LossScaleOptimizer(adamw(), mpcore.NoLossScale())
    mine = fit(build(ours, policy), *data(overflows=()))
    other = fit(build(adamw(), policy), *data(overflows=()))
    assert all(map(np.array_equal, weights(mine), weights(other)))


@pytest.mark.filterwarnings("ignore:each of the last")
@pytest.mark.parametrize("kind", ["ours", "keras"])
def test_the_scale_reaches_neither_zero_nor_infinity(kind: str) -> None:
    scales = []
    for first, growth, overflows in ((2.0**15, 1000, range(200)), (2.0**120, 1, ())):
        if kind == "ours":
            scaling = mpcore.DynamicLossScale(first, growth_interval=growth, max_scale=2.0**124)
            optimizer: Any = LossScaleOptimizer(adamw(), scaling)
        else:
            optimizer = keras.optimizers.LossScaleOptimizer(
                adamw(), initial_scale=first, dynamic_growth_steps=growth
            )
        x, y = data(200 if overflows else 12, overflows)
        # float32 holds losses times 2^120
        fit(build(optimizer, "mixed_float16" if overflows else "float32"), x * 1e-3, y * 1e-3)
        scales.append(float(optimizer.dynamic_scale))
    assert scales == ([1.0, 2.0**124] if kind == "ours" else [0.0, np.inf])


def test_a_saved_model_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    x, y = data()
    whole = fit(build(LossScaleOptimizer(adamw(), SCALING)), x, y)
    first = fit(build(LossScaleOptimizer(adamw(), SCALING)), x[:20], y[:20])
    first.save(tmp_path / "model.keras")
    second = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(second.optimizer, LossScaleOptimizer)
    assert second.optimizer.loss_scaling == SCALING
    assert second.optimizer._now == first.optimizer._now
    fit(second, x[20:], y[20:])
    assert all(map(np.array_equal, weights(second), weights(whole)))
    assert second.optimizer._now == whole.optimizer._now


@pytest.mark.parametrize(
    "scaling",
    [SCALING, mpcore.HeadroomLossScale(), mpcore.StaticLossScale(8.0), mpcore.NoLossScale()],
)
def test_every_kind_survives_its_configuration(scaling: Any) -> None:
    config = keras.saving.serialize_keras_object(LossScaleOptimizer(adamw(), scaling, name="mine"))
    made = keras.saving.deserialize_keras_object(json.loads(json.dumps(config)))
    assert made.loss_scaling == scaling
    assert (made.name, made.inner_optimizer.global_clipnorm) == ("mine", 0.5)
    config["config"]["loss_scale"]["kind"] = "Mine"
    with pytest.raises(mpcore.ArgumentError, match=r"got Mine.*compile=False"):
        LossScaleOptimizer.from_config(config["config"])


def test_a_value_that_overflows_when_it_is_unscaled_is_an_overflow() -> None:
    scaling = mpcore.StaticLossScale(2.0**-20)
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), scaling)
    variable = keras.Variable([1.0])
    optimizer.apply([torch.tensor([1e37])], [variable])
    assert variable.numpy().tolist() == [1.0]
    assert optimizer.skipped_steps == 1


def test_an_overflow_at_the_minimum_raises_if_told_to() -> None:
    scaling = mpcore.DynamicLossScale(1.0, at_min="raise")
    model = build(LossScaleOptimizer(adamw(), scaling))
    with pytest.raises(mpcore.LossScaleError):
        fit(model, *data())


def test_a_headroom_scale_leaves_room_above_the_largest_gradient() -> None:
    optimizer = LossScaleOptimizer(adamw(), mpcore.HeadroomLossScale())
    fit(build(optimizer), *data(overflows=()))
    assert optimizer.skipped_steps == 0
    assert optimizer.loss_scale != mpcore.HeadroomLossScale().first().scale


def test_what_is_no_loss_scale_is_refused() -> None:
    with pytest.raises(mpcore.ArgumentTypeError, match="loss_scale"):
        LossScaleOptimizer(adamw(), 1024.0)
