"""The general path: any `torch.optim.Optimizer` steps over FP32 masters, then weights are cast.

    unscale + check (one pass)  ->  inner.step() over masters  ->  masters rounded into weights

Whether to skip is decided on the device if the inner optimizer takes `found_inf`, otherwise by
one host sync.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcore.backends import Backend
from mpcore.base import held_here, own_memory, writes_to
from mpcore.engine.device_skips import is_torchs, takes_found_inf
from mpcore.engine.gradients import StepGradients
from mpcore.errors import StageError
from mpcore.masters import CheckpointGuard, DirectStepGuard, Masters, Snapshot, Writes
from mpcore.updates import parts_of

Closure = Callable[[], Any]
Groupings = Collection[int] | None  # numbers of param groups; None: all


class _Overflow(Exception):
    """Leaves an inner optimizer's step from within its closure; never seen by a user."""


class GeneralPath:
    """Steps an inner optimizer over FP32 masters.

    Args:
        inner: The wrapped optimizer; its groups hold the model's parameters between steps.
        masters: Masters and state.
        backend: Casts masters into weights.
        saturated: 0-d int64, counts weights clamped to the finite maximum.
        writes: Told before the first write, and after the last where no loss scale has to move.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        masters: Masters,
        backend: Backend,
        saturated: Tensor,
        writes: Writes,
    ) -> None:
        self.inner = inner
        self.masters = masters
        self.stepping = False
        self._backend = backend
        self._saturated = saturated
        self._writes = writes
        self.guard_inner()

    def guard_inner(self) -> None:
        """Registers hooks that refuse a direct `step` and checkpoints of the inner one."""
        for optimizer in dict.fromkeys([self.inner, *parts_of(self.inner)]):
            optimizer.register_step_pre_hook(DirectStepGuard(self))
            optimizer.register_state_dict_pre_hook(CheckpointGuard(self, "state_dict"))
            optimizer.register_load_state_dict_pre_hook(CheckpointGuard(self, "load_state_dict"))

    def step(self, gradients: StepGradients) -> None:
        """Unscales, then steps or skips; syncs with the host only if `inner` needs it."""
        gradients.apply()
        gradients.inspect()
        gradients.agree()
        self.step_groups(gradients.params, gradients.found_inf())

    def step_groups(
        self, params: Sequence[Tensor], found_inf: Tensor, numbers: Groupings = None
    ) -> None:
        """Steps param groups over the gradients that their masters have, or skips.

        Args:
            params: Those of these groups that have a gradient.
            found_inf: 0-d, non-zero: skip.
            numbers: Of the groups; None: all. The others are neither stepped nor rounded.
        """
        on_device = takes_found_inf(self.inner, map(self.masters.of, params))
        if not on_device and bool(found_inf):
            return
        with self.masters.decoded(self._with_master(numbers)):
            if on_device:
                self._step_on_device(found_inf, numbers)
            else:
                self._step_inner(numbers=numbers)
            self.write_weights(found_inf, self._saturated, numbers)
        self.link_state(numbers)

    def step_without_gradients(self, numbers: Groupings = None) -> None:
        """Lets the inner optimizer do what it does without gradients: usually nothing."""
        with self.masters.decoded():
            self._step_inner(numbers=numbers)
            self._take_results()
        self._writes.end()

    def call_inner(self, adopt: Callable[[], None], method: Callable[[], Any]) -> Any:
        """Calls a method of the inner optimizer over masters; weights follow, without a host sync.

        Args:
            adopt: Called once all masters are there.
            method: What is called.
        """
        self.masters.create_for(param for param in self._params() if param.requires_grad)
        adopt()
        self._writes.begin()
        result = self.call_over_masters(method)
        self._writes.end()
        return result

    def call_over_masters(self, method: Callable[[], Any]) -> Any:
        """Calls a method of the inner optimizer over masters, and rounds them into weights."""
        with self.masters.decoded():
            self.stepping = True
            try:
                with self.masters.in_groups():
                    result = method()
            finally:
                self.stepping = False
            self._take_results()
        return result

    def _take_results(self) -> None:
        """Rounds every master into its weight, and shows the inner state; no host sync."""
        nothing = torch.zeros((), dtype=torch.int32, device=self._saturated.device)
        self.write_weights(nothing, self._saturated)
        self.link_state()

    def initialise_state(self, gradients: StepGradients) -> None:
        """Steps over all-zero gradients so that the inner state exists, and changes no weight."""
        gradients.apply()
        targets = [self.masters.of(param) for param in gradients.params]
        with self.masters.decoded():
            before = [target.detach().clone() for target in targets]
            try:
                self._step_inner()
            finally:
                with torch.no_grad():
                    for target, value in zip(targets, before, strict=True):
                        target.copy_(value)
                gradients.release()
        self.link_state()
        self._writes.end()

    def step_with_closure(
        self,
        closure: Closure,
        collect: Callable[[], StepGradients],
        first: StepGradients | None = None,
    ) -> tuple[Any, StepGradients]:
        """Lets the inner optimizer evaluate `closure` as often as it wants; syncs each time.

        Before each evaluation the masters are rounded into the weights, after it the gradients
        are unscaled into the masters. On the first overflow everything goes back to where it was
        before the step.

        Args:
            closure: Clears gradients, computes the loss, calls `backward`, returns the loss.
            collect: Returns the gradients that the closure left.
            first: Those of a pass before, which some optimizers begin with (sharpness-aware ones).

        Returns:
            What the inner step, or on an overflow the last closure, returned; and the gradients
            of the last evaluation.
        """
        # such an optimizer may step parameters that the closure left without a gradient
        self.masters.create_for(param for param in self._params() if param.requires_grad)
        before = Snapshot(self.inner, self.masters)
        last: list[Any] = [None, first]  # loss and gradients of the latest evaluation
        evaluated = False
        if first is not None:
            first.apply()
            first.inspect()
            first.agree()
        called = StageError(
            f"step(closure): expected {type(self.inner).__name__} to call the closure, got a step "
            "that ignored it. Run backward() first and call step() without a closure."
        )

        def evaluate() -> Any:
            nonlocal evaluated
            if not evaluated and first is not None and self._is_used(first):
                raise _Overflow
            evaluated = True
            last[0], last[1] = self._evaluate(closure, collect, last[1])
            if bool(last[1].found_inf()):
                raise _Overflow
            return last[0]

        try:
            with self.masters.decoded():
                result = self._step_inner(evaluate)
                if not evaluated:
                    raise called
                self.write_weights(last[1].found_inf(), self._saturated)
        except _Overflow:
            before.restore()
            result = last[0]
        except BaseException:
            before.restore()
            self._writes.end()
            if last[1] is not None:
                last[1].release()
            raise
        finally:
            self.link_state()
        return result, last[1]

    def _evaluate(
        self,
        closure: Closure,
        collect: Callable[[], StepGradients],
        previous: StepGradients | None,
    ) -> tuple[Any, StepGradients]:
        if previous is not None:
            self.hand_back(previous)
            previous.release()
            nothing = torch.zeros_like(previous.found_inf())
            self.write_weights(nothing, torch.zeros_like(self._saturated))
        with self.masters.out_of_groups(), torch.enable_grad():
            loss = closure()
            gradients = collect()
        gradients.apply()
        gradients.inspect()
        gradients.agree()
        return loss, gradients

    def _is_used(self, first: StepGradients) -> bool:
        """Whether the inner optimizer has used gradients that overflow; syncs with the host."""
        used = any(self.masters.of(param).grad is None for param in first.params)
        return used and bool(first.found_inf())

    def link_state(self, numbers: Groupings = None) -> None:
        """Shows the inner optimizer's state in the wrapper's; no host sync."""
        self.masters.link_state(self._params(numbers))

    @torch.no_grad()
    def hand_back(self, gradients: StepGradients) -> None:
        """Makes the model's gradients what the inner optimizer has left of its own; no host sync.

        The next pass adds to them. It may have dropped them, or filled them with zeros: through
        `.data` too, which no version counter sees, so that all are copied.
        """
        for param in gradients.params:
            left = self.masters.of(param).grad
            if left is None:
                param.grad = None
            elif param.grad is not None and not (left is param.grad or param.grad.requires_grad):
                here = held_here(left)
                scaled = here / gradients.unscaled_by.to(here.device, non_blocking=True)
                held_here(own_memory(param, param.grad)).copy_(scaled)

    def write_weights(
        self, found_inf: Tensor, saturated: Tensor, numbers: Groupings = None
    ) -> None:
        """Rounds every master, or those of some groups, into its weight; no host sync.

        Args:
            found_inf: 0-d, non-zero: do not.
            saturated: 0-d int64, counts weights clamped to the finite maximum.
            numbers: Of groups; None: every master.
        """
        some = self._with_master(numbers)
        self.masters.write_weights(self._backend, found_inf, saturated, some)

    def _with_master(self, numbers: Groupings) -> list[Tensor] | None:
        """Returns the parameters of some groups that have a master; None: of all."""
        if numbers is None:
            return None
        return [p for p in self._params(numbers) if self.masters.of(p) is not p]

    def _step_on_device(self, found_inf: Tensor, numbers: Groupings) -> None:
        # torch's fused kernels skip on exactly 1.0; the attributes are its GradScaler's protocol
        inner: Any = self.inner
        inner.found_inf, inner.grad_scale = found_inf.float(), None
        try:
            self._step_inner(numbers=numbers)
        finally:
            del inner.found_inf, inner.grad_scale

    def _step_inner(self, closure: Closure | None = None, numbers: Groupings = None) -> Any:
        before = self._written() if closure is None else None
        self.stepping = True
        if closure is None:  # with one a snapshot undoes what was written
            self._writes.begin()
        try:
            with self.masters.in_groups(numbers):
                # without a closure call step() bare: some optimizers' step takes no argument
                result = self.inner.step() if closure is None else self.inner.step(closure)
        except BaseException:
            if before is not None and before == self._written():
                self._writes.end()
            raise
        finally:
            self.stepping = False
        # torch's fused kernels write parameters without telling autograd
        torch.autograd.graph.increment_version(
            [p for p in self._params(numbers) if p.grad is not None and self.masters.of(p) is p]
        )
        return result

    def _written(self) -> tuple[list[int], list[int]] | None:
        """Returns how often masters and state were written to; None where nobody counts.

        torch's own optimizers write so that autograd knows, but for fused kernels; others may
        write through `.data`.
        """
        if not is_torchs(self.inner) or any(
            group.get("fused") for group in self.inner.param_groups
        ):
            return None
        states = [state for state in self.inner.state.values() if isinstance(state, dict)]
        tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
        sizes = [len(state) for state in states]
        return writes_to([*map(self.masters.of, self._params()), *tensors]), sizes

    def _params(self, numbers: Groupings = None) -> list[Tensor]:
        return [
            param
            for number, group in enumerate(self.inner.param_groups)
            if numbers is None or number in numbers
            for param in group["params"]
        ]
