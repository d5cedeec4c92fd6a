"""`compare`: the same training under FP32 and under other policies, and whether they agree."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mpcore.base import check_count, check_number
from mpcore.comparison.contender import BASELINE, Choice, contenders
from mpcore.comparison.result import Comparison, Outcome
from mpcore.comparison.statistics import check_scipy
from mpcore.comparison.training_run import TrainingRun
from mpcore.errors import ArgumentError, ArgumentTypeError, LossScaleError, StageError

Train = Callable[[TrainingRun], float | Tensor | None]
Listener = Callable[[str, int], object]


def compare(
    train: Train,
    policies: Sequence[Choice] = ("float16", "bfloat16"),
    *,
    seeds: int | Sequence[int] = 3,
    metric: str = "loss",
    higher_is_better: bool = False,
    margin: float = 0.01,
    every: int = 20,
    activations: bool = True,
    on_run: Listener | None = None,
    on_seed: Callable[[Comparison], object] | None = None,
) -> Comparison:
    """Trains under FP32 and under each policy with the same seeds; as long as that takes.

    Args:
        train: Trains once: builds an FP32 model and its optimizer, takes
            `model, optimizer = run.prepare(model, optimizer)`, calls `optimizer.backward(loss)`,
            `step()` and `zero_grad()`, and returns the metric. None: the mean of the last
            twentieth of its losses.
        policies: Beside "float32": names, `Policy`, or `(policy, loss scale)`.
        seeds: How many, from 0, or which.
        metric: What tables call what `train` returns.
        higher_is_better: Whether a large metric is a good one.
        margin: Share of FP32's mean metric that does not matter to you.
        every: Steps between two readings of the gradients.
        activations: Whether to count what the first forward pass saves for its backward pass. Done
            with `torch.autograd.graph.saved_tensors_hooks`, which `torch.func` refuses to run
            under: pass False for such a loop, and for one with hooks of its own around `backward`.
        on_run: Is told the label and the seed of each run before it begins.
        on_seed: Is told, after each seed, what all seeds so far have given: what is there is kept
            if the next one is interrupted.

    Returns:
        Metrics, verdicts, curves, times and bytes.

    Raises:
        ArgumentTypeError: An argument is of another type.
        ArgumentError: A policy is there twice or unknown, or `margin` or `seeds` is impossible.
        StageError: `train` took no step with what `run.prepare` returned.
        ModuleNotFoundError: There are several seeds and no SciPy; it comes with the extra `report`.

    Example:
        >>> import torch, mpcore
        >>> def train(run):
        ...     model = torch.nn.Linear(4, 1)
        ...     adam = torch.optim.Adam(model.parameters(), lr=0.1)
        ...     model, optimizer = run.prepare(model, adam)
        ...     for _ in range(20):
        ...         inputs = torch.randn(16, 4)
        ...         loss = (model(inputs).squeeze() - inputs.sum(dim=1)).square().mean()
        ...         optimizer.backward(loss)
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> result = mpcore.compare(train, ["bfloat16"], seeds=1)
        >>> result.agreements["bfloat16"].name
        'one seed'
    """
    if not callable(train):
        raise ArgumentTypeError(f"train: expected a function, got {type(train).__name__}.")
    others = contenders(policies)
    chosen = list(range(check_count("seeds", seeds))) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen) or not all(type(s) is int for s in chosen):
        raise ArgumentError(f"seeds: expected whole numbers, each once, got {seeds!r}.")
    if not check_number("margin", margin) > 0:
        raise ArgumentError(f"margin: expected a number above 0, got {margin}.")
    check_count("every", every)
    if len(chosen) > 1:
        check_scipy()
    outcomes: list[Outcome] = []
    with _generators_kept():
        for seed in chosen:  # all policies in turn, so that a slow hour slows each of them
            for contender in (BASELINE, *others):
                if on_run is not None:
                    on_run(contender.label, seed)
                run = TrainingRun(contender, seed, every, counts_activations=activations)
                outcomes.append(_run(train, run))
            found = Comparison(metric, higher_is_better, margin, tuple(outcomes))
            if on_seed is not None:
                on_seed(found)
    return found


def _run(train: Train, run: TrainingRun) -> Outcome:
    _seed(run.seed)
    returned: float | Tensor | None = None
    failure = None
    try:
        returned = train(run)
    except LossScaleError as error:
        failure = str(error)
    finally:
        run.close()
    log = run.log
    if not log.courses:
        raise StageError(
            "train: expected steps of the optimizer that run.prepare(model, optimizer) returns, "
            "got none. Call backward(loss), step() and zero_grad() of that one."
        )
    return Outcome.of(run, float("nan") if failure else _metric(returned, run), failure)


def _metric(returned: float | Tensor | None, run: TrainingRun) -> float:
    if returned is not None:
        try:
            return float(returned.detach() if isinstance(returned, Tensor) else returned)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentTypeError(
                f"train: expected it to return a number or None, got {type(returned).__name__}: "
                f"{error}."
            ) from error
    losses = [loss for _, loss in run.log.losses]
    if not losses:
        raise StageError(
            "train: expected it to return a metric, or losses that go through "
            "optimizer.backward(loss), got neither. Return a number."
        )
    last = losses[-max(1, len(losses) // 20) :]
    return sum(last) / len(last)


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Puts the random generators back that training loops draw from."""
    ours = random.getstate()
    numpy = sys.modules.get("numpy")
    theirs = None if numpy is None else numpy.random.get_state()
    begun = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if begun else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(ours)
            if numpy is not None:
                numpy.random.set_state(theirs)
