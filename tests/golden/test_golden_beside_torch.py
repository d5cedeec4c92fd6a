"""The golden runs on the general path and the cpu backend, bit for bit beside torch's optimizers.

torch's own bits may change with its version and the processor, so that these are not recorded: the
oracle runs here, over float32 copies, with gradients that this file unscales, sums and clips.
"""

from __future__ import annotations

import math

import mpcore
import numpy as np
import pytest
import torch

from mpcore_testing.bits import rounded, same_bits
from mpcore_testing.golden.cases import CASES, MIXTURES, RULES
from mpcore_testing.golden.training import Training, factor

ENGINES = [
    ("cpu", "fused"),
    ("cpu", "general"),
    ("compiled", "general"),
    ("reference", "general"),
]
# torch has no fused Lion: there the cpu backend has the recorded bits
PAIRS = [
    pytest.param(f"{name}, {mixture}", backend, path, id=f"{name}, {mixture}: {backend} {path}")
    for name, rule in RULES.items()
    for mixture in (MIXTURES if name == "AdamW" else ("mixed",))
    for backend, path in ENGINES
    if not (path == "fused" and rule.kind is mpcore.optim.Lion)
]


class Torch:
    """float32 copies under the optimizer itself; fused if the engine is."""

    def __init__(self, training, path):
        self.case = training.case
        self.copies = [torch.nn.Parameter(p.detach().float().clone()) for p in training.params]
        self.optimizer = self.case.rule.build(
            self.copies, **({"fused": True} if path == "fused" else {})
        )
        self.first = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, number, step, scale):
        """One step of the plan; returns whether it was skipped, and the norm."""
        sums = [None] * len(self.copies)
        for i, one in enumerate(step.passes):
            for k, grad in enumerate(one.gradients(self.copies, number, i)):
                if grad is not None:
                    held = (grad * scale).to(self.case.dtypes[k]).float() * (1 / scale)
                    sums[k] = held if sums[k] is None else sums[k] + held
        present = [total for total in sums if total is not None]
        for group, lr in zip(self.optimizer.param_groups, self.first, strict=True):
            group["lr"] = lr * factor(number)
        if not all(bool(total.isfinite().all()) for total in present):
            return True, math.inf
        squares = (float(x) ** 2 for total in present for x in total.reshape(-1).tolist())
        norm = math.sqrt(math.fsum(squares))
        if step.clip is not None:
            # one multiply and one rounding from the stored gradient: its scale is a power of two
            shrink = min(1.0, step.clip / (norm + 1e-6))
            coefficient = torch.tensor(np.float32(shrink / scale))
            sums = [None if total is None else (total * scale) * coefficient for total in sums]
        for copy, total in zip(self.copies, sums, strict=True):
            copy.grad = total
        self.optimizer.step()
        return False, norm

    def moments(self):
        states = [dict(self.optimizer.state.get(copy, {})) for copy in self.copies]
        names = [sorted(state.keys() - {"step"}) for state in states]
        held = [state[name] for state, each in zip(states, names, strict=True) for name in each]
        return [tensor for tensor in held if tensor is not None]


@pytest.mark.parametrize(("name", "backend", "path"), PAIRS)
def test_each_step_has_the_bits_of_torchs_optimizer(name, backend, path):
    training = Training(CASES[name], backend, path=path)
    oracle = Torch(training, path)
    scale, skips = training.optimizer.loss_scale, 0
    for number, after in enumerate(training.run()):
        skipped, norm = oracle.step(number, CASES[name].plan[number], scale)
        scale, skips = after.scale[0], skips + skipped
        assert after.counters[:2] == [number + 1, skips]
        assert same_bits(after.masters, [copy.detach() for copy in oracle.copies]), number
        if skips <= number:  # before the first step that is taken, moments need not be there
            assert same_bits(after.moments, oracle.moments()), number
        pairs = zip(after.masters, after.weights, strict=True)
        assert same_bits([rounded(m, w.dtype) for m, w in pairs], after.weights)
        for found in after.norm:
            assert found.item() == np.float32(norm)
    assert skips == 2
