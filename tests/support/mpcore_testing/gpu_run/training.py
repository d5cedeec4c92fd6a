"""Part 5: whole training steps: tokens per second and peak memory by regime."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Sequence

import torch
from mpcore.bench.timing import time_call
from mpcore.demo.model import GPT, language_loss
from torch import Tensor

from mpcore_testing.gpu_run.models import MODELS, REGIMES, Model, Regime, Trainer, build, trainer
from mpcore_testing.gpu_run.record import Recorder, Row
from mpcore_testing.gpu_run.setting import Setting

#: How far losses may be from those of FP32 at the same step, as a share of what FP32's loss lost
#: over the checked steps. A step that was not taken moves a loss by about one step's share of that,
#: at least 1/8; 16-bit products move a mean over all tokens by far less.
BOUND = 0.1


def run(record: Recorder, setting: Setting) -> None:
    """Trains every model in every regime, as long as there is time."""
    for key in setting.sizes.models:
        _run_model(record, setting, key)
        _free(setting)


def _run_model(record: Recorder, setting: Setting, key: str) -> None:
    wanted = MODELS[key]
    start = None
    losses: list[float] = []
    batch = wanted.batch
    for regime in REGIMES:
        title = f"{wanted.label}: {regime.label}"
        if record.left <= 0:
            record.skip([title])
            continue
        if start is None:
            start = build(wanted.config, setting.device)
        if regime is REGIMES[0]:
            found = _first(record, setting, wanted, start, title)
            if found is None:
                record.skip(f"{wanted.label}: {other.label}" for other in REGIMES[1:])
                return
            losses, batch = found["losses"], found["batch"]
        else:
            measure = _measurement(setting, wanted, start, regime, batch, losses)
            record.row(title, measure)
        _free(setting)


def _first(record: Recorder, setting: Setting, model: Model, start: GPT, title: str) -> Row | None:
    """FP32, with the batch halved until it fits."""
    batch = model.batch
    while True:
        measure = _measurement(setting, model, start, REGIMES[0], batch, [])
        found = record.row(title, measure)
        if found is None or not found.get("out_of_memory"):
            return found
        if batch == 1:
            return None
        record.rows.pop()
        batch //= 2
        _free(setting)


def _measurement(
    setting: Setting, model: Model, start: GPT, regime: Regime, batch: int, fp32: Sequence[float]
) -> Callable[[], Row]:
    def measure() -> Row:
        try:
            return _measure(setting, model, start, regime, batch, fp32)
        except torch.cuda.OutOfMemoryError:
            # a result: the regime needs more than there is
            return {"model": model.label, "key": regime.key, "batch": batch, "out_of_memory": True}

    return measure


def _measure(
    setting: Setting, model: Model, start: GPT, regime: Regime, batch: int, fp32: Sequence[float]
) -> Row:
    torch.set_float32_matmul_precision("high" if regime.tf32 else "highest")
    device = setting.device
    before = _allocated(setting)
    text = _tokens(model, batch, device)
    trained = trainer(copy.deepcopy(start), regime, device)

    def step() -> Tensor:
        with regime.arithmetic(device):
            loss = language_loss(trained.model(text[:, :-1]), text[:, 1:].contiguous())
        trained.backward(loss)
        trained.step()
        return loss.detach()

    # these warm up as well
    checked = [float(step()) for _ in range(setting.sizes.checked)]
    _reset_peak(setting)
    seconds = [time_call(step, device) for _ in range(setting.sizes.timed)]
    median = statistics.median(seconds)
    tokens = batch * model.config.context
    return {
        "model": model.label,
        "key": regime.key,
        "label": regime.label,
        "parameters": sum(param.numel() for param in start.parameters()),
        "batch": batch,
        "context": model.config.context,
        "losses": checked,
        "wrong": wrong(checked, fp32 or checked),
        "skipped": trained.skipped(),
        "median_s": median,
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "tokens_per_second": tokens / median,
        "peak_bytes": _peak(setting, before),
        "weights": _formats(trained),
    }


def wrong(losses: Sequence[float], fp32: Sequence[float]) -> str | None:
    """Why the losses of a regime are not those of training; None if they are."""
    if not losses[-1] < losses[0]:
        return f"the loss does not go down: {losses[0]:.4f} at first, {losses[-1]:.4f} at last"
    lost = fp32[0] - fp32[-1]
    off = [abs(loss - expected) / lost for loss, expected in zip(losses, fp32, strict=True)]
    if not all(value <= BOUND for value in off):  # NaN is not within the bound
        step = next(i for i, value in enumerate(off) if not value <= BOUND)
        return f"loss {losses[step]:.4f} at step {step + 1}, FP32 {fp32[step]:.4f}"
    return None


def _tokens(model: Model, batch: int, device: torch.device) -> Tensor:
    """Random tokens, the same in every regime; they are learnt by heart, so the loss goes down."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, model.config.context + 1)
    return torch.randint(model.config.vocabulary, shape, generator=generator).to(device)


def _formats(trained: Trainer) -> str:
    """Formats of the weights."""
    kinds = {str(p.dtype).removeprefix("torch.") for p in trained.model.parameters()}
    return ", ".join(sorted(kinds))


def _free(setting: Setting) -> None:
    gc.collect()
    if setting.on_a_gpu:
        torch.cuda.empty_cache()


def _allocated(setting: Setting) -> int:
    return torch.cuda.memory_allocated(setting.device) if setting.on_a_gpu else 0


def _reset_peak(setting: Setting) -> None:
    if setting.on_a_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)


def _peak(setting: Setting, before: int) -> int | None:
    """Bytes beyond those in use before the model was made; None on a CPU."""
    if not setting.on_a_gpu:
        return None
    return torch.cuda.max_memory_allocated(setting.device) - before
