"""The advice of every `StageError` outside of the engine; and that none is without a row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mpcore
import pytest
import torch
from mpcore import updates
from mpcore.backends import reference
from mpcore.demo.processes import Processes
from mpcore.emulate import emulate_tensor_cores
from mpcore.errors import StageError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpcore_testing.batches import FULL, HALF, OPTIONS, make_batch, make_grads, scalar
from mpcore_testing.loops import batch, loop, make
from mpcore_testing.stage_errors import ranks
from mpcore_testing.stage_errors.rows import ROWS
from mpcore_testing.stage_errors.sites import site_of, sites

#: What raises, and what follows the advice and checks that it has helped.
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def update_without_scalars() -> Pair:
    rule, moments, numbers = OPTIONS[0]
    given = make_batch(moments, HALF, [3, 5])
    plan = reference.plan_update(rule, [updates.Batch(**vars(given))])
    grads = [make_grads(given, HALF, 0)]
    zero = scalar(0, torch.int32, "cpu")

    def update() -> None:
        reference.update_(plan, grads, scalar(1.0, FULL, "cpu"), zero, zero.long())

    def follow() -> None:
        before = given.masters[0].clone()
        reference.prepare_(plan, updates.Hyper((numbers,), (None,)))
        update()
        assert not torch.equal(before, given.masters[0])

    return update, follow


class Parallel(nn.parallel.DistributedDataParallel):
    """No process group is needed to be one."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


def wrapped_too_early() -> Pair:
    parallel = Parallel(nn.Linear(2, 2))

    def follow() -> None:
        model = Parallel(mpcore.cast_model(parallel.module, HALF))
        assert model(torch.ones(1, 2)).dtype == HALF

    return partial(mpcore.cast_model, parallel, HALF), follow


def with_gradients(clears: bool) -> Pair:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()

    def follow() -> None:
        cast = nn.Linear(2, 2)
        if clears:
            model.zero_grad()
            cast = model
        mpcore.cast_model(cast, HALF)
        cast(torch.ones(1, 2)).sum().backward()
        assert cast.weight.grad is not None
        assert cast.weight.grad.dtype == HALF

    return partial(mpcore.cast_model, model, HALF), follow


def cast_otherwise() -> Pair:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    mpcore.cast_model(model, HALF)

    def follow() -> None:
        anew = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        mpcore.cast_model(anew, torch.bfloat16)
        assert anew(torch.ones(1, 2)).dtype == torch.bfloat16

    return partial(mpcore.cast_model, model, torch.bfloat16), follow


def another_policy() -> Pair:
    model = mpcore.Policy("mixed_float16").apply(nn.Linear(2, 2))

    def follow() -> None:
        anew = mpcore.Policy("mixed_bfloat16").apply(nn.Linear(2, 2))
        anew(torch.ones(1, 2)).sum().backward()

    return partial(mpcore.Policy("mixed_bfloat16").apply, model), follow


def compared(train: Callable[[mpcore.TrainingRun], Any]) -> Callable[[], Any]:
    return partial(mpcore.compare, train, ["bfloat16"], seeds=1)


def steps_of_another() -> Pair:
    def train(run: mpcore.TrainingRun) -> float:
        model, plain = make()
        run.prepare(model, plain)
        model(batch()[0]).sum().backward()
        return 1.0

    return compared(train), compared(loop(steps=1))


def without_a_metric() -> Pair:
    def train(run: mpcore.TrainingRun) -> None:
        model, optimizer = run.prepare(*make())
        optimizer.scale(torch.ones(()))
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer._stage.watcher._losses.clear()
        optimizer.step()

    def follow(run: mpcore.TrainingRun) -> float:
        train(run)
        return 2.0

    return compared(train), compared(follow)


def prepared_twice(groups: bool) -> Pair:
    def train(run: mpcore.TrainingRun) -> float:
        run.prepare(*make())
        run.prepare(*make())
        return 1.0

    def follow(run: mpcore.TrainingRun) -> float:
        model, inner = make()
        other = nn.Linear(8, 1)
        inner.add_param_group({"params": list(other.parameters())})
        models, optimizer = run.prepare(nn.ModuleList([model, other]), inner)
        x = batch()[0].to(other.weight.dtype)
        optimizer.backward((models[0](x) + models[1](x)).float().mean())
        optimizer.step()
        return 1.0

    return compared(train), compared(follow if groups else loop(steps=1))


class RoundsProducts(TorchDispatchMode):
    """Stands in for a CPU whose FP32 products are computed in BF16 if that is allowed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and torch.get_float32_matmul_precision() != "highest":
            args = tuple(x.bfloat16().float() for x in args)
        return func(*args, **(kwargs or {}))


def rounded_products() -> Pair:
    def enter() -> None:
        with RoundsProducts(), emulate_tensor_cores():
            x = torch.full((4, 4), 1 + 2.0**-10)
            assert (x @ x)[0, 0] == 4 * (1 + 2.0**-10) ** 2

    def provoke() -> None:
        torch.set_float32_matmul_precision("medium")
        try:
            enter()
        finally:
            torch.set_float32_matmul_precision("highest")

    return provoke, enter


def job(mended: bool, job: str, advance: Any) -> str:
    if not mended:
        raise ValueError(job)
    return job.upper()


def prepare(mended: bool) -> Any:
    return partial(job, mended)


def end_of_a_process(mended: bool) -> Any:
    if not mended:
        raise SystemExit(9)
    return partial(job, True)


def failing_job(function: Any, count: int) -> Pair:
    def run(mended: bool, count: int) -> Any:
        return Processes(partial(function, mended), count).run(["a"], lambda _: print)

    def follow() -> None:
        assert run(True, 1) == ["A"]

    return partial(run, False, count), follow


TABLE: list[tuple[str, str, Callable[[], Pair]]] = [
    (
        "shares.py Shares.compare 1",
        "Load or broadcast weights before the optimizer is made",
        ranks.other_masters,
    ),
    (
        "agreement.py Agreement._raise_if_apart 1",
        "Load one checkpoint on all ranks.",
        ranks.other_scale,
    ),
    (
        "agreement.py Agreement._raise_if_apart 2",
        "Clear the gradients and call optimizer.backward(loss)",
        ranks.no_scale,
    ),
    (
        "step_ranks.py StepRanks.check_not_joined 1",
        "Give all ranks as many batches",
        ranks.several_passes,
    ),
    ("_update.py take_scalars 1", "Call prepare_(plan, hyper)", update_without_scalars),
    ("cast_model.py _check_stage 1", "Cast the model, then wrap it.", wrapped_too_early),
    (
        "cast_model.py _check_stage 2",
        "or set the gradients to None",
        partial(with_gradients, clears=True),
    ),
    (
        "cast_model.py _check_stage 2",
        "Cast before training begins",
        partial(with_gradients, clears=False),
    ),
    ("cast_model.py _check_hooks 1", "Build the model anew and cast it once.", cast_otherwise),
    ("policy.py _check_applied 1", "Build the model anew and apply one policy.", another_policy),
    (
        "compare.py _run 1",
        "Call backward(loss), step() and zero_grad() of that one.",
        steps_of_another,
    ),
    ("compare.py _metric 1", "Return a number.", without_a_metric),
    (
        "training_run.py TrainingRun.prepare 1",
        "Use what the first returned",
        partial(prepared_twice, groups=False),
    ),
    (
        "training_run.py TrainingRun.prepare 1",
        "several models train as param groups of one optimizer",
        partial(prepared_twice, groups=True),
    ),
    (
        "emulate.py _check_float32_products 1",
        "Call torch.set_float32_matmul_precision('highest') first.",
        rounded_products,
    ),
    (
        "processes.py _receive 1",
        "use fewer processes",
        partial(failing_job, end_of_a_process, 2),
    ),
    (
        "processes.py _receive 2",
        "Mend what its traceback shows",
        partial(failing_job, prepare, 1),
    ),
]


@pytest.mark.parametrize(("site", "says", "pair"), TABLE, ids=[row[1] for row in TABLE])
def test_whoever_follows_the_advice_goes_on(site: str, says: str, pair: Callable[[], Pair]) -> None:
    provoke, follow = pair()
    with pytest.raises(StageError) as error:
        provoke()
    assert site_of(error.tb) == site
    assert says in str(error.value)
    assert ": expected " in str(error.value)
    assert ", got " in str(error.value)
    follow()


def test_no_error_is_without_a_row() -> None:
    judged = {row.site for row in ROWS} | {site for site, _, _ in TABLE}
    assert set(sites()) == judged
