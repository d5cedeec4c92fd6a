"""Part 3: whole steps of the engine, overflow in the first one, waits, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from mpcore_testing.engine_runs import OPTIMIZERS, OVERFLOWS, Training
from mpcore_testing.gpu import captured, no_sync
from mpcore_testing.gpu_run.compare import Differences
from mpcore_testing.gpu_run.record import Recorder, Row, described
from mpcore_testing.gpu_run.setting import Setting

#: the last of them overflows, like the first
_STEPS = 5


def run(record: Recorder, setting: Setting) -> None:
    """Takes steps on the device beside the same ones of the reference on the CPU."""
    norms = (None, 0.5) if setting.on_a_gpu else (0.5,)
    for norm in norms:
        record.row(f"waits, {_clip(norm)}", lambda n=norm: _waits(setting, n))
    record.row("overflow in the first step", lambda: _first(setting))
    names = list(OPTIMIZERS) if setting.sizes.mode != "rehearsal" else ["AdamW"]
    dtypes = (torch.float16, torch.bfloat16) if setting.on_a_gpu else (torch.bfloat16,)
    for dtype in dtypes:
        for norm in norms:
            for name in names:
                title = f"steps, {name}, {str(dtype).removeprefix('torch.')}, {_clip(norm)}"
                case = (name, dtype, norm)
                record.row(title, lambda c=case: _steps(setting, *c))
    for name in names:  # last: a capture that fails may leave the process unfit for more
        record.row(f"graph, {name}, clipped", lambda n=name: _graph(setting, n, 0.5))


def _clip(norm: float | None) -> str:
    return "not clipped" if norm is None else "clipped"


def _training(setting: Setting, name: str, dtype: torch.dtype = torch.float16) -> Training:
    build = OPTIMIZERS[name]
    return Training(build, dtype, "triton", float32=True, device=setting.device)


def _reference(name: str, dtype: torch.dtype = torch.float16) -> Training:
    cpu = torch.device("cpu")
    return Training(OPTIMIZERS[name], dtype, "reference", float32=True, device=cpu)


def _add(found: Differences, ours: Training, theirs: Training, number: int) -> None:
    for place, (a, e) in enumerate(zip(ours.tensors(), theirs.tensors(), strict=True)):
        found.add(f"tensor {place} after step {number}", a, e)


def _counters(run: Training) -> list[float]:
    optimizer = run.optimizer
    return [optimizer.loss_scale, optimizer.steps, optimizer.skipped_steps]


def _steps(setting: Setting, name: str, dtype: torch.dtype, norm: float | None) -> Row:
    """Steps, two of which overflow; differences add up, since each step builds on the last."""
    found, ours, theirs = Differences(), _training(setting, name, dtype), _reference(name, dtype)
    for number in range(_STEPS):
        for run in (ours, theirs):
            run.load(number)
            run.step(norm)
        _add(found, ours, theirs, number)
    return {**found.to_row(), "counters": _counters(ours), "expected": _counters(theirs)}


def _first(setting: Setting) -> Row:
    """The first step overflows: nothing moves but the loss scale and its counters."""
    found, ours = Differences(), _training(setting, "AdamW")
    weights = [param.detach().clone() for param in ours.params]
    scale = ours.optimizer.loss_scale
    ours.load(0)
    ours.step(0.5)
    for param, before in zip(ours.params, weights, strict=True):
        found.add("weight", param, before)
        kept = ours.optimizer.state[param]
        found.add("master", kept.get("master", param), before.float())
        found.add("exp_avg", kept["exp_avg"], torch.zeros_like(kept["exp_avg"]))
    return {**found.to_row(), "counters": _counters(ours), "expected": [scale / 2, 1, 1]}


def _waits(setting: Setting, norm: float | None) -> Row:
    """Steps within which a call that waits for the GPU raises, after one that uploads tables."""
    ours = _training(setting, "AdamW")
    waits: str | None = None
    for number in range(4):
        ours.load(number, in_place=number > 0)
        guard: AbstractContextManager[None] = no_sync() if number else nullcontext()
        try:
            with guard:
                ours.step(norm)
        except RuntimeError as raised:  # a result, unless it is something else altogether
            if "synchroniz" not in str(raised):
                raise
            waits = waits or described(raised)["traceback"]
    return {"waits": waits, "counters": _counters(ours), "expected": [256.0, 4, 1]}


def _graph(setting: Setting, name: str, norm: float) -> Row:
    """A captured step over overflows: beside kernels launched one by one, and reference."""
    ours, eager, theirs = _training(setting, name), _training(setting, name), _reference(name)
    rate = torch.tensor(0.01, device=setting.device)
    for run, value in ((ours, rate), (eager, rate.clone()), (theirs, rate.item())):
        _set(run, value)
    for run in (ours, eager, theirs):  # masters and moments, at addresses that stay
        run.load(0)
        run.step(norm)
    ours.load(1, in_place=True)
    replay = captured(lambda: _take(ours, norm), _state(ours))
    launched, judged = Differences(), Differences()
    for number in range(1, 1 + _STEPS):
        ours.load(number, in_place=True)
        replay()
        for run in (eager, theirs):
            run.load(number)
            run.step(norm)
        _add(launched, ours, eager, number)
        _add(judged, ours, theirs, number)
    return {
        **judged.to_row(),
        "launched_one_by_one": launched.to_row(),
        "counters": _counters(ours),
        "expected": _counters(theirs),
        "overflows": len(OVERFLOWS),
    }


def _set(run: Training, rate: torch.Tensor | float) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = rate


def _state(run: Training) -> Sequence[torch.Tensor]:
    """All that a step writes: it is put back after the step that graphs want before a capture."""
    scale = run.optimizer._scale
    return [
        *run.tensors(),
        *(scale.scale, scale.growth_tracker, scale.overflows_left, scale.counters),
    ]


def _take(run: Training, norm: float) -> None:
    """A step by itself: its loss is scaled within the capture."""
    scale: Callable[[torch.Tensor], torch.Tensor] = run.optimizer.scale
    scale(run.loss)
    run.step(norm)
