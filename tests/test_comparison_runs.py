"""`mpcore.compare`: what is measured of a run, and what loops may do."""

from __future__ import annotations

import mpcore
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpcore_testing.loops import batch, loop, make


def test_bytes_are_those_counted_by_hand() -> None:
    result = mpcore.compare(loop(steps=20), ["float16"], seeds=1)
    fp32, fp16 = result.of("float32")[0], result.of("float16")[0]
    count = 8 * 16 + 16 + 16 + 1
    assert fp32.memory is not None
    assert fp16.memory is not None
    sizes = (fp32.memory.weights, fp32.memory.gradients, fp32.memory.masters, fp32.memory.moments)
    assert sizes == (4 * count, 4 * count, 0, 4 * count)
    sizes = (fp16.memory.weights, fp16.memory.gradients, fp16.memory.masters, fp16.memory.moments)
    assert sizes == (2 * count, 2 * count, 4 * count, 4 * count)
    # saved: inputs 32 x 8, tanh 32 x 16, the result and the targets 32 of the loss
    assert fp32.activations == 4 * (32 * 8 + 32 * 16 + 32 + 32)
    # the casts save nothing; the loss is FP32 under each policy
    assert fp16.activations == 2 * (32 * 8 + 32 * 16) + 4 * (32 + 32)


def test_measuring_ends_with_the_first_loss_and_in_runs_that_raise() -> None:
    def raising(run: mpcore.TrainingRun) -> None:
        run.prepare(*make())
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        mpcore.compare(raising)
    # refuses to be entered while hooks of saved tensors are in force
    with torch.autograd.graph.disable_saved_tensors_hooks("in force"):
        pass


def test_a_loop_around_backward_keeps_no_activations() -> None:
    kept = []

    def train(run: mpcore.TrainingRun) -> float:
        model, optimizer = run.prepare(*make())
        for _ in range(3):
            model(batch()[0]).float().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.append(run._monitor.saved)  # type: ignore[union-attr]
        return 1.0

    result = mpcore.compare(train, ["bfloat16"], seeds=1)
    assert kept == [None] * 6
    assert result.outcomes[0].activations is None


def test_sparse_tensors_and_functional_transforms_can_be_compared() -> None:
    def sparse(run: mpcore.TrainingRun) -> float:
        model, optimizer = run.prepare(*make())
        hidden = model(batch()[0]).float()
        optimizer.backward(torch.sparse.mm(torch.eye(32).to_sparse(), hidden).square().mean())
        optimizer.step()
        return 1.0

    def functional(run: mpcore.TrainingRun) -> float:
        model, optimizer = run.prepare(*make())
        inputs, _ = batch()
        slope = torch.func.grad(lambda x: model(x).float().sum())(inputs)
        optimizer.backward(model(inputs).square().mean() + slope.mean())
        optimizer.step()
        return 1.0

    assert (mpcore.compare(sparse, ["bfloat16"], seeds=1).outcomes[0].activations or 0) > 0
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        mpcore.compare(functional, ["bfloat16"], seeds=1)
    result = mpcore.compare(functional, ["bfloat16"], seeds=1, activations=False)
    assert result.outcomes[0].activations is None


def test_closures_begin_alike_and_short_runs_have_their_bytes() -> None:
    def train(run: mpcore.TrainingRun) -> float:
        model = nn.Linear(8, 1)
        lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
        model, optimizer = run.prepare(model, lbfgs)
        inputs, targets = batch()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(inputs), targets)
            optimizer.backward(loss)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return 1.0

    result = mpcore.compare(train, seeds=2)
    assert result.warnings == []
    memory = result.of("float16")[0].memory
    assert memory is not None
    assert (memory.weights, memory.gradients, memory.masters) == (18, 18, 36)


def test_a_policy_that_skips_most_steps_fails() -> None:
    policies = [("float16", mpcore.StaticLossScale(2.0**60))]
    result = mpcore.compare(loop(steps=20, lr=1e-9), policies, seeds=2)
    [found] = result.agreements.values()
    assert (found.name, found.text) == ("fails", "Most steps were skipped in 2 of 2 runs.")


@pytest.mark.parametrize("metric", ["much", (1.0, 2.0), torch.ones(2)])
def test_what_is_no_metric_is_named(metric: object) -> None:
    def train(run: mpcore.TrainingRun) -> object:
        loop(steps=1)(run)
        return metric

    with pytest.raises(mpcore.ArgumentTypeError, match="train: expected it to return a number"):
        mpcore.compare(train, seeds=1)  # type: ignore[arg-type]


def test_infinite_metrics_of_both_signs_are_told_of() -> None:
    def train(run: mpcore.TrainingRun) -> float:
        loop(steps=1)(run)
        return torch.inf if run.seed else -torch.inf

    result = mpcore.compare(train, ["bfloat16"], seeds=2)
    assert "not finite" in str(result)
