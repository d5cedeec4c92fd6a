"""mpcore inside `lightning.pytorch.Trainer`, automatic and manual, and Lightning's Fabric."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing.trainer_loops import (
    SCALING,
    Course,
    Overflows,
    adamw,
    batches,
    masters,
    network,
    own_loop,
    prepared,
    schedule,
    squared_error,
)
from mpcore_testing.trainer_ranks import check_ranks

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]
lightning = pytest.importorskip("lightning")

from lightning.fabric import Fabric  # noqa: E402
from mpcore.integrations.lightning import (  # noqa: E402
    FabricMasterWeightsPrecision,
    MasterWeightsPrecision,
)

from mpcore_testing import lightened  # noqa: E402
from mpcore_testing.lightened import Data, Module, loader, trainer_of  # noqa: E402

HALF, BRAIN = torch.float16, torch.bfloat16
COURSES = {
    "float16": Course(),
    "overflows": Course(overflows=(0, 3, 4)),
    "overflows, fused": Course(overflows=(0, 3, 4), fused=True),
    "clip": Course(max_norm=0.5, overflows=(0, 3, 4)),
    "accumulation": Course(passes=3, max_norm=0.5, overflows=(4,)),
    "bfloat16": Course(dtype=BRAIN),
    "bfloat16, clip": Course(dtype=BRAIN, max_norm=0.5),
}


def fit(course: Course, folder: Path, **options: Any) -> Any:
    module = options.pop("module", None) or Module(course)
    trainer_of(course, folder, **options).fit(module, loader(Data(course)))
    return module


def expected_of(course: Course, **options: Any) -> Any:
    return own_loop(
        course, network(course.dtype), iter(Data(course).rows), squared_error, **options
    )


@pytest.mark.parametrize("name", COURSES)
def test_masters_rates_and_skips_are_those_of_our_own_loop(name: str, tmp_path: Path) -> None:
    course = COURSES[name]
    module = fit(course, tmp_path)
    expected = expected_of(course)
    module.outcome().check_same(expected)
    assert sum(expected.skipped) == len(course.overflows) == module.optimizer.skipped_steps
    assert {grad.dtype for grad in module.seen} == {torch.float32}


def test_clip_by_value_is_that_of_our_own_loop(tmp_path: Path) -> None:
    course = Course(max_norm=1e-3, overflows=(2,))
    module = fit(course, tmp_path, gradient_clip_algorithm="value")

    def clip(optimizer: Any, model: nn.Module, limit: float) -> None:
        optimizer.unscale_()
        torch.nn.utils.clip_grad_value_(model.parameters(), limit)

    module.outcome().check_same(expected_of(course, clip=clip))


@pytest.mark.parametrize("nones", [{2, 3}, {0, 1}, {6, 7}])
@pytest.mark.parametrize("passes", [1, 2])
def test_batches_without_a_loss_are_left_out(passes: int, nones: Any, tmp_path: Path) -> None:
    course = Course(steps=8 // passes, passes=passes, max_norm=0.5)
    module = fit(course, tmp_path, module=Module(course, nones=nones))
    rows = [row for i, row in enumerate(Data(course).rows) if i not in nones]
    left = replace(course, steps=len(rows) // passes)
    expected = own_loop(left, network(HALF), iter(rows), squared_error)
    assert all(map(torch.equal, module.outcome().masters, expected.masters))
    assert module.optimizer.steps == left.steps


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_learning_rates_under_an_overflow_are_those_of_plain_adamw(tmp_path: Path) -> None:
    """Lightning moves the schedule in each step; the documented override waits, as elsewhere."""
    course = Course(overflows=(0, 3, 4))

    class Plain(Module):
        def configure_optimizers(self) -> Any:
            Overflows(list(self.net.parameters())[-1], course.overflows)
            self.optimizer = adamw(self.net.parameters())
            each_step = {"scheduler": schedule(self.optimizer), "interval": "step"}
            return {"optimizer": self.optimizer, "lr_scheduler": each_step}

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            lightning.LightningModule.lr_scheduler_step(self, scheduler, metric)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    amp = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    full = replace(course, dtype=torch.float32)
    plain = fit(full, tmp_path, module=Plain(full), plugins=amp)
    moving = fit(course, tmp_path, module=Module(course, waits=False))
    assert moving.rates == plain.rates
    assert len(set(moving.rates)) == course.steps
    waiting = fit(course, tmp_path)
    assert len(set(waiting.rates)) == course.steps - len(course.overflows)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("name", ["clip", "bfloat16, clip"])
def test_a_resumed_run_has_the_same_bits(name: str, tmp_path: Path) -> None:
    course = COURSES[name]
    saves = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, filename="cut", every_n_train_steps=5, save_top_k=-1
    )
    whole = fit(course, tmp_path, callbacks=[saves], enable_checkpointing=True)
    rest = replace(course, overflows=[n - 5 for n in course.overflows])
    second = Module(rest)
    data = Data(course)
    data.rows = data.rows[5:] + data.rows[:5]  # a loader that has no state begins anew
    resumed = trainer_of(course, tmp_path, callbacks=[saves], enable_checkpointing=True)
    resumed.fit(second, loader(data), ckpt_path=tmp_path / "cut.ckpt")
    assert second.rates == whole.rates[5:]
    assert second.skipped == whole.skipped[5:]
    for mine, theirs in zip(second.outcome().masters, whole.outcome().masters, strict=True):
        assert torch.equal(mine, theirs)


class Adversaries(Module):
    """Two optimizers under manual optimization, with a clip of each."""

    def __init__(self, course: Course, algorithm: str = "norm") -> None:
        super().__init__(course)
        self.automatic_optimization, self.algorithm = False, algorithm
        self.other = network(course.dtype, seed=5)

    def configure_optimizers(self) -> Any:
        """Both have scales of their own."""
        self.both = [
            prepared(self.course, self.net),
            prepared(replace(self.course, overflows=()), self.other),
        ]
        return self.both

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step of each, after so many passes."""
        passes = self.course.passes
        for net, opt in zip((self.net, self.other), self.optimizers(), strict=True):
            self.manual_backward(opt.scale(squared_error(net, batch) / passes))
            if (batch_idx + 1) % passes:
                continue
            self.clip_gradients(opt, gradient_clip_val=0.5, gradient_clip_algorithm=self.algorithm)
            opt.step()
            opt.zero_grad()


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_two_optimizers_under_manual_optimization(
    passes: int, dtype: torch.dtype, algorithm: str, tmp_path: Path
) -> None:
    course = Course(dtype=dtype, passes=passes, max_norm=0.5, overflows=(0, 3, 4))
    module = Adversaries(course, algorithm)
    trainer = trainer_of(Course(), tmp_path)  # clips and accumulation are the module's own
    trainer.fit(module, loader(Data(course)))
    for net, optimizer, seed, overflows in zip(
        (module.net, module.other), module.both, (0, 5), (course.overflows, ()), strict=True
    ):
        twin = network(dtype, seed)
        other = prepared(replace(course, overflows=overflows), twin)
        for number, batch in enumerate(Data(course).rows, 1):
            other.backward(squared_error(twin, batch) / passes)
            if number % passes:
                continue
            other.unscale_()
            if algorithm == "norm":
                torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            else:
                torch.nn.utils.clip_grad_value_(twin.parameters(), 0.5)
            other.step()
            other.zero_grad()
        assert all(map(torch.equal, masters(net, optimizer), masters(twin, other)))
        assert optimizer.skipped_steps == len({n // passes for n in overflows})
        assert optimizer.loss_scale == other.loss_scale


def test_a_loss_that_nobody_has_scaled_is_an_error(tmp_path: Path) -> None:
    class Forgets(Adversaries):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            opt, _ = self.optimizers()
            self.manual_backward(squared_error(self.net, batch))
            opt.step()

    with pytest.raises(mpcore.StageError, match="got no scale"):
        fit(Course(), tmp_path, module=Forgets(Course()))


def test_an_optimizer_of_torch_steps_as_without_the_plugin(tmp_path: Path) -> None:
    class Plain(Module):
        def configure_optimizers(self) -> Any:
            self.optimizer = adamw(self.net.parameters())
            return self.optimizer

    course = Course(dtype=torch.float32, max_norm=0.5)
    with_it = fit(course, tmp_path, module=Plain(course))
    usual = lightning.pytorch.plugins.Precision()
    without = fit(course, tmp_path, module=Plain(course), plugins=usual)
    assert all(map(torch.equal, with_it.net.parameters(), without.net.parameters()))


class OnFabric:
    """The loop of Fabric's documentation."""

    def __init__(self, course: Course, clip: str | None = "norm") -> None:
        self.course, self.clip = course, clip
        self.fabric = Fabric(accelerator="cpu", devices=1, plugins=FabricMasterWeightsPrecision())
        self.net = network(course.dtype)
        self.inner = prepared(course, self.net)
        self.scheduler = schedule(self.inner)
        self.model, self.optimizer = self.fabric.setup(self.net, self.inner)

    def train(self, data: Any, steps: int | None = None) -> None:
        for _ in range(self.course.steps if steps is None else steps):
            for number in range(self.course.passes):
                waits = number < self.course.passes - 1
                with self.fabric.no_backward_sync(self.model, enabled=waits):
                    loss = squared_error(self.model, next(data)) / self.course.passes
                    self.fabric.backward(self.optimizer.scale(loss))
            if self.clip is not None:
                limit = {"norm": "max_norm", "value": "clip_val"}[self.clip]
                options: Any = {limit: self.course.max_norm, "error_if_nonfinite": False}
                self.fabric.clip_gradients(self.model, self.optimizer, **options)
            self.optimizer.step()
            self.optimizer.zero_grad()
            mpcore.step_scheduler(self.scheduler, self.optimizer.last_step)

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}


@pytest.mark.filterwarnings("ignore:The model passed to `Fabric.no_backward_sync")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("clip", ["norm", "value", None])
def test_fabric(dtype: torch.dtype, clip: str | None, passes: int) -> None:
    course = Course(dtype=dtype, passes=passes, overflows=(0, 3), max_norm=0.5)
    run = OnFabric(course, clip)
    run.train(batches(course.steps * passes, dtype))

    def clip_(wrapped: Any, module: nn.Module, limit: float) -> None:
        if clip is not None:
            wrapped.unscale_()
        if clip == "norm":
            torch.nn.utils.clip_grad_norm_(module.parameters(), limit)
        elif clip == "value":
            torch.nn.utils.clip_grad_value_(module.parameters(), limit)

    data = batches(course.steps * passes, dtype)
    expected = own_loop(course, network(dtype), data, squared_error, clip=clip_)
    assert all(map(torch.equal, masters(run.net, run.inner), expected.masters))
    assert run.inner.skipped_steps == 2


def test_fabric_resumes_with_the_same_bits(tmp_path: Path) -> None:
    course = Course(max_norm=0.5, overflows=(0, 3, 6))
    whole, first = OnFabric(course), OnFabric(course)
    whole.train(batches(course.steps, HALF))
    data = batches(course.steps, HALF)
    first.train(data, 5)
    first.fabric.save(tmp_path / "cut.ckpt", first.state)
    second = OnFabric(replace(course, overflows=(1,)))
    second.fabric.load(tmp_path / "cut.ckpt", second.state)
    second.train(data, 3)
    results = [masters(run.net, run.inner) for run in (second, whole)]
    assert all(map(torch.equal, *results))
    assert second.inner.loss_scale == whole.inner.loss_scale
    assert second.scheduler.last_epoch == whole.scheduler.last_epoch


def test_masters_of_cast_model_are_the_float32_originals(tmp_path: Path) -> None:
    class Casts(Module):
        def configure_optimizers(self) -> Any:
            self.optimizer = mpcore.MixedPrecisionOptimizer(adamw(self.net.parameters()), SCALING)
            self.originals = [p.detach().clone() for p in self.net.parameters()]
            mpcore.cast_model(self.net, HALF, self.optimizer)
            self.begun = masters(self.net, self.optimizer)
            return self.optimizer

    module = Casts(Course())
    module.net = network()
    fit(Course(), tmp_path, module=module)
    assert all(map(torch.equal, module.begun, module.originals))
    assert module.net[0].weight.dtype == HALF
    assert module.optimizer.steps == Course().steps


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo")
def test_two_ranks_skip_together_when_one_overflows_and_train_as_one_process(
    tmp_path: Path,
) -> None:
    expected = lightened.in_one_process()
    assert sum(expected[0].skipped) == len(lightened.RANKED.overflows)
    check_ranks(lightened.__file__, tmp_path, expected)


def test_an_optimizer_that_evaluates_its_closure_itself_is_refused_by_name(tmp_path: Path) -> None:
    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def configure_optimizers(self) -> Any:
            self.layer = nn.Linear(2, 1).half()
            return mpcore.MixedPrecisionOptimizer(torch.optim.LBFGS(self.layer.parameters()))

        def training_step(self, batch: Any, index: int) -> Any:
            return self.layer(batch.half()).float().square().mean()

    trainer = lightning.Trainer(
        plugins=MasterWeightsPrecision(),
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(mpcore.ArgumentError, match="one around LBFGS, which evaluates it itself"):
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2))
