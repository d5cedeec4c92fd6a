"""Steps captured into a CUDA graph and replayed across overflows."""

import pytest
import torch
from mpcore.backends import reference

from mpcore_kernels import Launcher
from mpcore_kernels._table import CHUNK
from mpcore_testing.batches import Move
from mpcore_testing.gpu import DEVICE, ON_A_GPU, captured
from mpcore_testing.kernels import assert_same_bits, random_finite
from mpcore_testing.marks import needs_a_gpu

pytestmark = pytest.mark.gpu

SIZES = [3, CHUNK, 2 * CHUNK + 7]
OVERFLOWS = [2, 5, 6]


class Training:
    """All tensors of a small training loop at fixed addresses, and one step of it."""

    def __init__(self, backend, device):
        self.backend = backend
        self.masters = [random_finite(n, torch.float32, seed=n).to(device) for n in SIZES]
        self.weights = [m.half() for m in self.masters]
        self.grads = [torch.zeros_like(w) for w in self.weights]
        self.outs = [torch.zeros_like(m) for m in self.masters]
        self.nonfinite = torch.zeros(len(SIZES), dtype=torch.int32, device=device)
        self.found_inf = torch.zeros((), dtype=torch.int32, device=device)
        self.saturated = torch.zeros((), dtype=torch.int64, device=device)
        self.coefficient = torch.ones((), device=device)
        self.norm = torch.zeros((), device=device)
        self.move = Move.on(device)

    def load(self, step):
        """Puts the gradients of this step in place."""
        for i, grad in enumerate(self.grads):
            values = random_finite(grad.numel(), torch.float16, seed=100 * step + i)
            if step in OVERFLOWS and i == step % len(SIZES):
                values[-1] = torch.inf
            grad.copy_(values)

    def step(self):
        self.nonfinite.zero_()
        torch.reciprocal(self.move.scale, out=self.coefficient)
        found = self.backend.inspect(self.grads, self.coefficient, 1.0)
        self.norm.copy_(found.grad_norm)
        self.backend.unscale_into(self.grads, self.outs, found.coefficient, self.nonfinite)
        torch.amax(self.nonfinite, 0, out=self.found_inf)
        for master, out in zip(self.masters, self.outs, strict=True):
            torch.where(self.found_inf != 0, master, master - out, out=master)
        self.backend.cast_into(self.masters, self.weights, self.found_inf, self.saturated)
        self.backend.update_scale_(self.move, self.found_inf)

    def tensors(self):
        state = [*self.move.tensors(), self.norm, self.coefficient, self.saturated]
        return [*self.masters, *self.weights, *self.outs, self.nonfinite, *state]


def test_a_captured_step_is_replayed_across_overflows_as_the_reference_takes_it():
    training, expected = Training(Launcher(), DEVICE), Training(reference, "cpu")
    replay = captured(training.step, training.tensors())
    for step in range(9):
        for loop in (training, expected):
            loop.load(step)
        replay()
        expected.step()
        for actual, e in zip(training.tensors(), expected.tensors(), strict=True):
            assert_same_bits(actual, e)
        assert training.found_inf.item() == int(step in OVERFLOWS)


def test_a_captured_step_survives_the_launchers_other_work():
    # as many as one step needs
    launcher = Launcher(capacity=3)
    training, expected = Training(launcher, DEVICE), Training(reference, "cpu")
    replay = captured(training.step, training.tensors())
    for _ in range(20):
        others = [torch.ones(5, device=DEVICE) for _ in range(3)]
        launcher.inspect(others, torch.ones((), device=DEVICE), None)
    if ON_A_GPU:
        torch.cuda.empty_cache()
    garbage = [torch.full((n,), -1, device=DEVICE) for n in range(1, 200)]
    for loop in (training, expected):
        loop.load(0)
    replay()
    expected.step()
    for actual, e in zip(training.tensors(), expected.tensors(), strict=True):
        assert_same_bits(actual, e)
    assert len(garbage) == 199


@needs_a_gpu
def test_a_capture_with_tensors_that_are_new_raises():
    launcher, grads = Launcher(), [torch.ones(5, device=DEVICE)]
    one, other = torch.ones((), device=DEVICE), torch.zeros(3, device=DEVICE)
    launcher.inspect([other], one, None)  # compiles

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            other.add_(1)
            launcher.inspect(grads, one, None)

    with pytest.raises(RuntimeError, match="expected a table built before the capture"):
        capture()
