"""Steps captured into a CUDA graph and replayed across overflows."""

import pytest
import torch
import triton
from mpcore.backends import reference
from mpcore.loss_scale import LossScaleState
from mpcore.scale_tensors import LossScaleTensors

from mpcore_kernels import Launcher
from mpcore_kernels._table import CHUNK
from mpcore_kernels.unscale import _unscale_kernel
from mpcore_testing.kernels import assert_same_bits, random_finite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
    pytest.mark.skipif(
        not isinstance(_unscale_kernel, triton.JITFunction), reason="the kernels are interpreted"
    ),
]

SIZES = [3, CHUNK, 2 * CHUNK + 7]
OVERFLOWS = [2, 5, 6]
RULE = {
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2,
    "min_scale": 1.0,
    "max_scale": 2.0**24,
    "hysteresis": 1,
    "refill": 0,
}


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
        state = LossScaleState(2.0**10, 0, 1, 0, 0)
        self.state = LossScaleTensors.from_state(state, torch.device(device))

    def load(self, step):
        """Puts the gradients of this step in place."""
        for i, grad in enumerate(self.grads):
            values = random_finite(grad.numel(), torch.float16, seed=100 * step + i)
            if step in OVERFLOWS and i == step % len(SIZES):
                values[-1] = torch.inf
            grad.copy_(values)

    def step(self):
        self.nonfinite.zero_()
        torch.reciprocal(self.state.scale, out=self.coefficient)
        found = self.backend.inspect(self.grads, self.coefficient, 1.0)
        self.norm.copy_(found.grad_norm)
        self.backend.unscale_into(self.grads, self.outs, found.coefficient, self.nonfinite)
        torch.amax(self.nonfinite, 0, out=self.found_inf)
        for master, out in zip(self.masters, self.outs, strict=True):
            torch.where(self.found_inf != 0, master, master - out, out=master)
        self.backend.cast_into(self.masters, self.weights, self.found_inf, self.saturated)
        self.backend.update_scale_(*vars(self.state).values(), self.found_inf, **RULE)

    def tensors(self):
        scalars = [self.norm, self.coefficient, self.state.scale]
        return [*self.masters, *self.weights, *self.outs, *scalars]

    def counts(self):
        return [self.saturated.item(), self.nonfinite.tolist(), *self.state.to_state()]


def captured(training):
    """The graph of one step, after a warm-up whose effects are taken back."""
    saved = [t.clone() for t in training.tensors()]
    state = training.state.to_state()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training.step()
    for tensor, before in zip(training.tensors(), saved, strict=True):
        tensor.copy_(before)
    training.state.assign_(state)
    training.saturated.zero_()
    return graph


def test_a_captured_step_is_replayed_across_overflows_as_the_reference_takes_it():
    training, expected = Training(Launcher(), "cuda"), Training(reference, "cpu")
    graph = captured(training)
    for step in range(9):
        for loop in (training, expected):
            loop.load(step)
        graph.replay()
        expected.step()
        for actual, e in zip(training.tensors(), expected.tensors(), strict=True):
            assert_same_bits(actual, e)
        assert training.counts() == expected.counts()
        assert training.found_inf.item() == int(step in OVERFLOWS)


def test_a_captured_step_survives_the_launchers_other_work():
    # as many as one step needs
    launcher = Launcher(capacity=3)
    training, expected = Training(launcher, "cuda"), Training(reference, "cpu")
    graph = captured(training)
    for _ in range(20):
        others = [torch.ones(5, device="cuda") for _ in range(3)]
        launcher.inspect(others, torch.ones((), device="cuda"), None)
    torch.cuda.empty_cache()
    garbage = [torch.full((n,), -1, device="cuda") for n in range(1, 200)]
    for loop in (training, expected):
        loop.load(0)
    graph.replay()
    expected.step()
    for actual, e in zip(training.tensors(), expected.tensors(), strict=True):
        assert_same_bits(actual, e)
    assert len(garbage) == 199


def test_a_capture_with_tensors_that_are_new_raises():
    launcher, grads = Launcher(), [torch.ones(5, device="cuda")]
    one, other = torch.ones((), device="cuda"), torch.zeros(3, device="cuda")
    launcher.inspect([other], one, None)  # compiles

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            other.add_(1)
            launcher.inspect(grads, one, None)

    with pytest.raises(RuntimeError, match="expected a table built before the capture"):
        capture()
