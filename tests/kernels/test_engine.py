"""The engine on the kernels: the bits of the reference backend, in a fixed number of launches."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpcore_kernels._launch import Variant
from mpcore_testing.engine_runs import OPTIMIZERS, OVERFLOWS, Training
from mpcore_testing.kernels import HALVES, assert_same_bits
from mpcore_testing.lengths import in_turn


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize(("name", "dtype"), in_turn(list(OPTIMIZERS), HALVES))
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


@pytest.mark.filterwarnings("ignore:.*were written to by others")
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_training_whose_weights_are_written_to_has_the_bits_of_the_reference_backend(name, device):
    runs = [
        Training(OPTIMIZERS[name], HALVES[0], b, float32=True, device=device, rule="always")
        for b in ("triton", "reference")
    ]
    for number in range(6):
        for run in runs:
            run.load(number)
            run.params[0].data[0, number % 3] = number
            run.params[1].data[700 * number] = -number
            if number == 3:
                run.params[0].grad = None  # which no update reads then
            run.step()
        assert runs[0].optimizer.last_step.skipped == (number in OVERFLOWS)
        for actual, expected in zip(runs[0].tensors(), runs[1].tensors(), strict=True):
            assert_same_bits(actual, expected)
        if number in OVERFLOWS:
            assert runs[0].optimizer.state[runs[0].params[1]]["master"][700 * number] == -number
    assert runs[0].optimizer.check_masters() == []


class Launches(TorchDispatchMode):
    """Whatever would be launched on a GPU: kernels, and operations of torch that do work there."""

    #: They allocate, look at what is there in another shape, or tell autograd of a write.
    FREE = (
        "_record_function",
        "empty",
        "detach",
        "view",
        "unbind",
        "select",
        "slice",
        "alias",
        "split",
        "expand",
    )

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self.inside = [], False
        launch = Variant.launch

        def counting(variant, programs, arguments):
            self.found.append(variant.name)
            self.inside = True  # the interpreter is made of operations, too
            launch(variant, programs, arguments)
            self.inside = False

        monkeypatch.setattr(Variant, "launch", counting)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        nothing = isinstance(result, torch.Tensor) and result.numel() == 0
        if not self.inside and not nothing and not name.startswith(self.FREE):
            self.found.append(name)
        return result


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize(("float32", "launches"), [(False, 3), (True, 5)])
@pytest.mark.parametrize("rule", ["adopt", "always"])
def test_a_step_takes_three_launches_and_five_with_float32_weights(
    rule, float32, launches, max_norm, monkeypatch, device
):
    make = OPTIMIZERS["AdamW"]
    run = Training(make, torch.float16, "triton", float32=float32, device=device, rule=rule)
    with Launches(monkeypatch) as launched:
        for number in range(3):
            run.load(number, in_place=number > 0)
            launched.found.clear()
            run.step(max_norm)
            # the first step makes masters and moments as well
            assert number == 0 or len(launched.found) == launches, launched.found
