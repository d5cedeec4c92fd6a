"""The passes of a cast model, watched for what the cast could not know.

Buffers that a forward pass writes go back to FP32, since an average or a counter in 16 bits stands
still; and inputs that FP16 makes infinite are named.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpcore.base import SIXTEEN_BIT, HostCopy, comes_late, is_capturing
from mpcore.precision.buffers import WRITTEN
from mpcore.precision.casts import is_rounded, named_tensors, plain_tensors
from mpcore.precision.lender import Lender, is_lent, lend_running, lender_of
from mpcore.precision.report import CastReport
from mpcore.precision.writes import WriteWatch, in_fp32

_INFINITE = 65520.0  # from here on FP16 rounds to infinity


class _Pass(NamedTuple):
    """A pass under way: the mode that looks at its writes, and the buffers at its beginning."""

    mode: WriteWatch | None
    begun: dict[str, tuple[Tensor, tuple[int, int]]]


class Watch:
    """The hooks of a model that was cast: before and after each of its forward passes.

    The first pass in training and the first in evaluation are watched operation by operation, the
    others by version counters. Compiled passes are not watched.

    Args:
        report: What the cast did.
        owners: By the names of the report's buffers, the modules that have them.
        originals: The FP32 values of buffers that were rounded, by name; let go once both kinds of
            passes were seen.

    Attributes:
        report: The same, and what was widened since.
    """

    def __init__(
        self,
        report: CastReport,
        owners: dict[str, nn.Module],
        originals: dict[str, Tensor],
    ) -> None:
        self.report = report
        self._owners = owners
        self._originals = originals
        self._seen: set[bool] = set()
        self._passes: list[_Pass] = []
        self._asked: list[tuple[list[str], Tensor, HostCopy | None]] = []
        self._has_named = False
        self._kept = set(report.kept_buffers)
        self._in_backward = False
        self._unsaid: list[str] = []
        self._lenders: list[tuple[Lender, nn.Module]] = []

    def __getstate__(self) -> dict[str, Any]:
        # a copy has no pass under way
        return self.__dict__ | {"_passes": [], "_asked": [], "_in_backward": False}

    def attach(self, model: nn.Module) -> None:
        """Registers both hooks, before those that cast inputs."""
        owners = dict.fromkeys(self._owners.values())
        self._lenders = [(each, owner) for owner in owners if (each := lender_of(owner))]
        model.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True)
        model.register_forward_hook(self.after, always_call=True)

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Looks at the batch, and begins to watch; syncs with a CPU alone."""
        if _is_traced(args, kwargs):
            return
        if self.report.dtype == torch.float16 and not self._has_named:
            self._look_at_inputs(model, args, kwargs)
        self._take_back()
        for name, _, buffer in list(self._buffers()):
            if name in self._kept and buffer.dtype in SIXTEEN_BIT:  # somebody has put it back
                _put(model, buffer, in_fp32(buffer, self._originals.get(name)))
        for lender, owner in self._lenders:
            lender.before(owner, args)
        begun = {name: (t, _state(t)) for name, _, t in self._buffers()}
        mode = None
        watched = {name: t for name, (t, _) in begun.items() if t.dtype in SIXTEEN_BIT}
        captures = any(is_capturing(tensor.device) for tensor in watched.values())
        if watched and model.training not in self._seen and not captures:
            mode = WriteWatch(watched, self._originals)
            mode.__enter__()  # type: ignore[no-untyped-call]
        self._passes.append(_Pass(mode, begun))

    def after(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Widens the 16-bit buffers that the pass has written, and says so once for each.

        Returns the model's result, without tensors that give way.
        """
        if torch.compiler.is_compiling() or not self._passes:
            return None
        mode, begun = self._passes.pop()
        if mode is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for lender, owner in reversed(self._lenders):
            lender.after(owner, args, output)
        if mode is not None:
            self._seen.add(model.training)
            if len(self._seen) == 2:
                self._originals.clear()
        shadows = mode.shadows if mode is not None else {}
        written = []
        for name, owner, now in list(self._buffers()):
            wide = _widened(owner, _leaf(name), now, begun.get(name), shadows.get(name))
            if wide is not None:
                _put(model, now, wide)
                written.append(name)
        for name in written:
            if name not in self._kept:
                self._kept.add(name)
                self.report = self.report.with_kept(name, WRITTEN)
                self._unsaid.append(name)
        if self._unsaid and sys.exc_info()[0] is None:  # else a later pass says it
            self._say()
        self._lend_to_backward(output)
        return plain_tensors(output)

    def _lend_to_backward(self, output: Any) -> None:
        """Lends buffers to the backward pass too, where checkpointed functions run once more."""
        if self._kept:
            for _, tensor in named_tensors((output,), {}):
                if tensor.grad_fn is not None:
                    tensor.register_hook(self._begin_backward)  # type: ignore[no-untyped-call]

    def _begin_backward(self, grad: Tensor) -> None:
        if not self._in_backward and not torch.compiler.is_compiling():
            self._in_backward = True
            for lender, owner in self._lenders:
                lender.before(owner, ())
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._take_back)

    def _take_back(self) -> None:
        """Ends the backward pass, or one that raised before its end."""
        if self._in_backward:
            self._in_backward = False
            for lender, owner in reversed(self._lenders):
                lender.after(owner, (), None)

    def _say(self) -> None:
        written, self._unsaid = self._unsaid, []
        warnings.warn(
            f"cast_model: the forward pass writes to {', '.join(written)}, which would stand still "
            "in 16 bits: in FP32 from now on. To have that from the start, name them in "
            f"keep_fp32={written}, or give cast_model a batch.",
            stacklevel=3,
        )

    def _buffers(self) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """Yields the name, owner and tensor of every floating buffer that is still there."""
        for name, owner in self._owners.items():
            tensor = owner._buffers.get(_leaf(name))
            if tensor is None or tensor.layout != torch.strided:
                continue
            if tensor.is_floating_point():
                yield name, owner, tensor

    def _look_at_inputs(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Warns once of finite inputs that FP16 makes infinite; of those on a GPU a pass later."""
        given = {
            name: tensor
            for name, tensor in named_tensors(args, kwargs)
            if type(tensor) is Tensor and is_rounded(model, tensor)
        }
        devices = {tensor.device for tensor in given.values()}
        # others than these would have to be waited for
        if any(is_capturing(d) or not (d.type == "cpu" or comes_late(d)) for d in devices):
            return
        if given and not self._asked:
            found = [torch.where(t.isinf(), 0, t.detach()).amax().float() for t in given.values()]
            where = next(filter(comes_late, devices), found[0].device)
            largest = torch.stack([each.to(where) for each in found])
            copy = HostCopy(largest) if comes_late(largest.device) else None
            self._asked.append((list(given), largest, copy))
        self._answer()

    def _answer(self) -> None:
        if not self._asked:
            return
        names, largest, copy = self._asked[0]
        if copy is not None and (is_capturing(largest.device) or not copy.has_arrived()):
            return
        self._asked.clear()
        values = (largest if copy is None else copy.values).tolist()
        too_large = [f"{n} ({v:g})" for n, v in zip(names, values, strict=True) if v >= _INFINITE]
        if too_large:
            self._has_named = True
            warnings.warn(
                "cast_model: the batch holds values that FP16 makes infinite, in "
                f"{', '.join(too_large)}: it ends at 65504. Scale that input before it reaches "
                "the model, or cast to torch.bfloat16.",
                stacklevel=2,
            )


def watch_of(model: nn.Module) -> Watch | None:
    """Returns the watch of a model that was cast as a whole, if it was."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((each for each in owners if isinstance(each, Watch)), None)


def _is_traced(args: Any, kwargs: Any) -> bool:
    """Tells whether nobody computes with numbers now: something compiles, traces or transforms."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(is_wrapped(tensor) or tensor.is_meta for _, tensor in named_tensors(args, kwargs))


def _state(tensor: Tensor) -> tuple[int, int]:
    """Returns what changes when somebody writes to a tensor, or gives it other values."""
    with torch._C.DisableTorchFunctionSubclass():
        version = -1 if tensor.is_inference() else tensor._version
        return version, tensor.untyped_storage()._cdata


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _widened(
    owner: nn.Module,
    leaf: str,
    now: Tensor,
    begun: tuple[Tensor, tuple[int, int]] | None,
    shadow: Tensor | None,
) -> Tensor | None:
    """Returns in FP32 a buffer that a pass has written in 16 bits; None if it was none.

    Args:
        owner: The module that has it.
        leaf: Its name there.
        now: The buffer after the pass.
        begun: The tensor that it was before, and its `_state`; None if there was none.
        shadow: What it would hold now in FP32, where that was followed.
    """
    before, state = begun if begun is not None else (None, None)
    is_half, is_new = now.dtype in SIXTEEN_BIT, now is not before
    if is_new and (now.requires_grad or (not is_half and is_lent(owner, leaf))):
        return None  # part of a graph, which a copy would leave; or nothing to do
    if is_half and not is_new and shadow is not None:
        return shadow
    if is_half and (is_new or _state(now) != state):
        return now.detach().float()
    return now if is_new else None


def _put(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Puts a buffer in the place of another, wherever that is.

    It is another tensor, since the graph of the pass may have saved the old one.
    """
    if new.is_inference():  # which a pass in training could not write to
        with torch.inference_mode(False):
            new = new.clone()
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is old:
                module._buffers[leaf] = new
                lend_running(module, leaf)
