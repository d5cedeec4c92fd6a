"""The engine on the kernels: the bits of the reference backend, in a fixed number of launches."""

import pytest
import torch

from mpcore_kernels._launch import Variant
from mpcore_testing.engine_runs import OPTIMIZERS, OVERFLOWS, Training
from mpcore_testing.kernels import assert_same_bits


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_on_the_kernels_has_the_bits_of_the_reference_backend(
    name, dtype, max_norm, device
):
    build = OPTIMIZERS[name]
    runs = [
        Training(build, dtype, backend, float32=True, device=device)
        for backend in ("triton", "reference")
    ]
    for number in range(7):
        for run in runs:
            run.load(number)
            run.step(max_norm)
        ours, theirs = (run.optimizer for run in runs)
        assert ours.last_step.skipped == theirs.last_step.skipped == (number in OVERFLOWS)
        assert ours.loss_scale == theirs.loss_scale
        for actual, expected in zip(runs[0].tensors(), runs[1].tensors(), strict=True):
            assert_same_bits(actual, expected)
    assert (ours.steps, ours.skipped_steps) == (7, len(OVERFLOWS))


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize(("float32", "launches"), [(False, 3), (True, 5)])
def test_a_step_takes_three_launches_and_five_with_float32_weights(
    float32, launches, max_norm, monkeypatch, device
):
    run = Training(OPTIMIZERS["AdamW"], torch.float16, "triton", float32=float32, device=device)
    launched = []
    launch = Variant.launch

    def counting(variant, programs, *arguments):
        launched.append(variant.name)
        launch(variant, programs, *arguments)

    monkeypatch.setattr(Variant, "launch", counting)
    for number in range(3):
        launched.clear()
        run.load(number)
        run.step(max_norm)
        assert len(launched) == launches, launched
