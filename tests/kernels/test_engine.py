"""The engine on the kernels: the bits of the reference backend, in a fixed number of launches."""

import mpcore
import pytest
import torch
from mpcore.optim import Lion

from mpcore_kernels._launch import Variant
from mpcore_testing.kernels import assert_same_bits

OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True, maximize=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, dampening=0.25),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1, lr_decay=0.1),
    "Lion": lambda groups: Lion(groups, lr=0.01, weight_decay=0.1),
}
OVERFLOWS = {0, 4}


class Training:
    """An engine over weights of two shapes; a third one stays float32, as norms do."""

    def __init__(self, build, dtype, backend, *, float32, device):
        generator = torch.Generator().manual_seed(0)
        shapes = [(5, 3), (4099,), *([(7,)] if float32 else [])]
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        dtypes = [dtype, dtype, torch.float32]
        self.params = [
            torch.nn.Parameter(value.to(device, kind))
            for value, kind in zip(values, dtypes, strict=False)
        ]
        groups = [{"params": self.params[:1]}, {"params": self.params[1:], "lr": 0.003}]
        self.optimizer = mpcore.MixedPrecisionOptimizer(
            build(groups),
            mpcore.DynamicLossScale(init=256.0, growth_interval=2),
            backend=backend,
            path="fused",
        )

    def step(self, number, max_norm):
        generator = torch.Generator().manual_seed(number)
        self.optimizer.scale(torch.ones(()))
        for param in self.params:
            grad = torch.randn(param.shape, generator=generator) * self.optimizer.loss_scale
            grad[0] = torch.inf if number in OVERFLOWS else grad[0]
            param.grad = grad.to(param)
        if max_norm is not None:
            self.optimizer.clip_grad_norm_(max_norm)
        self.optimizer.step()

    def tensors(self):
        """Returns every parameter and all that the optimizer keeps of it."""
        states = [self.optimizer.state[param] for param in self.params]
        kept = [state[key] for state in states for key in sorted(state)]
        return [param.detach() for param in self.params] + kept


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
            run.step(number, max_norm)
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
        run.step(number, max_norm)
        assert len(launched) == launches, launched
