"""A dry run: what a copy of the model does with a batch before anything is cast."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpcore.base import map_tensors
from mpcore.errors import ArgumentError
from mpcore.precision.buffers import WRITTEN, Choices, owner_of
from mpcore.precision.weak import RunningTensor, WeakTensor
from mpcore.precision.writes import WriteWatch

Cast = Callable[[nn.Module, Choices], None]


def rehearse(model: nn.Module, batch: Any, choices: Choices, cast: Cast) -> Choices:
    """Returns the choices as a forward pass over a batch would have them; syncs many times.

    What the pass writes stays in FP32. So does what would be rounded, if the model then runs and
    has no more FP32 activations than with it rounded: all of it, or else one after the other.

    The model, its buffers and the random number generators are left as they were.

    Args:
        model: Not cast yet. Copies of it are run.
        batch: A tensor, a tuple of positional or a dictionary of keyword arguments.
        choices: What would become of the buffers without a batch.
        cast: Casts a copy.

    Raises:
        ArgumentError: The model does not run on the batch, or not in 16 bits.
    """
    written, _ = _run(model, batch, choices, lambda _: None)
    for name in written:
        # what is known to be single, or written, already is one
        if choices[name].kind is not RunningTensor:
            choices = choices | {name: choices[name].kept(RunningTensor, WRITTEN)}
    _, fewest = _run(model, batch, choices, lambda other: cast(other, choices))
    rounded = [name for name, choice in choices.items() if choice.error > 0 and choice.is_dense]
    if rounded and _is_free(model, batch, _with(choices, rounded), cast, fewest):
        return _with(choices, rounded)
    for name in rounded:
        if _is_free(model, batch, _with(choices, [name]), cast, fewest):
            choices = _with(choices, [name])
    return choices


def _with(choices: Choices, names: Sequence[str]) -> Choices:
    """Returns the choices with some buffers kept in FP32."""
    reason = "the dry run has no more FP32 activations with it"
    return choices | {name: choices[name].kept(WeakTensor, reason) for name in names}


def _is_free(model: nn.Module, batch: Any, choices: Choices, cast: Cast, fewest: int) -> bool:
    """Tells whether a model runs with these choices, without more FP32 activations."""
    try:
        _, found = _run(model, batch, choices, lambda other: cast(other, choices))
    except ArgumentError:
        return False
    return found <= fewest


def _run(
    model: nn.Module, batch: Any, names: Iterable[str], prepare: Callable[[nn.Module], None]
) -> tuple[list[str], int]:
    """Runs a copy forward: returns which buffers it wrote, and how many FP32 activations it had."""
    other = copy.deepcopy(model)
    prepare(other)
    for param in other.parameters():
        if param.is_floating_point():
            param.requires_grad_(True)  # what comes of them is an activation
    owners = {name: owner_of(other, name) for name in names}
    bound = {name: owner._buffers[leaf] for name, (owner, leaf) in owners.items()}
    before = {name: buffer for name, buffer in bound.items() if buffer is not None}
    watch, count = WriteWatch(before, {}), _WideActivations()
    with _generators_left_alone(model), torch.enable_grad(), watch, count:
        try:
            _call(other, map_tensors(batch, lambda tensor: tensor.detach().clone()))
        except Exception as error:
            raise ArgumentError(
                f"batch: expected one that the model runs on, got {type(error).__name__}: {error}. "
                "Give another; if the model runs on it in FP32, keep the module that raises in "
                "FP32 (keep_fp32)."
            ) from error
    now = {name: owner._buffers.get(leaf) for name, (owner, leaf) in owners.items()}
    rebound = [name for name, buffer in now.items() if buffer is not bound[name]]
    return list(dict.fromkeys([*watch.shadows, *rebound])), count.found


class _WideActivations(TorchFunctionMode):
    """Counts the elements of FP32 results that carry gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and each.dtype == torch.float32 and each.requires_grad:
                self.found += each.numel()
        return result


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


@contextmanager
def _generators_left_alone(model: nn.Module) -> Iterator[None]:
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(state)
