"""Plays a sequence on an engine and on the model of it, compares both after each operation."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
from mpcore.errors import StageError

from mpcore_testing.engines import Engine
from mpcore_testing.sequences.compare import compare
from mpcore_testing.sequences.on_gradients import OnGradients
from mpcore_testing.sequences.on_weights import OnWeights
from mpcore_testing.sequences.operations import Operation, Sequence
from mpcore_testing.sequences.pair import flat
from mpcore_testing.sequences.state import EVERY

ADOPTED = re.compile(r"^(\d+) elements of .* were written to by others")


class Injected(BaseException):
    """What a backend raises; like a KeyboardInterrupt it is no `Exception`."""


class Play(OnGradients, OnWeights):
    """Does what operations say: each names a method, but for "fault"."""

    def do(self, operation: Operation) -> None:
        """One operation, after which the engine is what the model says."""
        self.model.adopted = 0
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            # NumPy's, in which the kernels' interpreter computes
            warnings.filterwarnings("ignore", ".* encountered in ", RuntimeWarning)
            self.call(operation)
        found = [ADOPTED.match(str(one.message)) for one in told]
        assert all(found), [str(one.message) for one in told]
        number = sum(int(match[1]) for match in found if match)
        assert number == self.model.adopted or not self.hears_all, (
            f"expected a warning of {self.model.adopted} elements, got one of {number}"
        )
        compare(self.optimizer, self.params, self.model)

    def call(self, operation: Operation) -> None:
        name, *arguments = operation
        getattr(self, name)(*arguments)

    def fault(self, call: int, when: str, operation: Operation) -> None:
        """A call into the backend fails; then the user does what the engine says, or tries again.

        What an exception leaves is the step before, or everything raises until it was recovered.
        """
        before = self.checkpoint()
        model = copy.deepcopy(self.model)
        self.backend.arm(call, when, Injected)
        try:
            self.call(operation)
            return
        except Injected:
            self.hears_all = False
        finally:
            self.backend.disarm()
        self.model = model
        name = operation[0]
        try:
            self.optimizer.state_dict()
        except StageError as error:
            half_a_step = "Load a checkpoint" in str(error)
            self.check_may_be_half(half_a_step, name)
            self.recover(before if half_a_step else None)
            self.take_what_came_early(adopts=name in ("step", "closure") and not half_a_step)
        else:
            self.take_what_came_early(adopts=name in ("step", "closure"))
            # what has come since the last accumulate() may be in the sums already; zero_grad() has
            # cleared gradients, and a closure does
            gradients = self.model.sums is None and name not in ("zero_grad", "closure")
            compare(self.optimizer, self.params, self.model, gradients=gradients)
            self.call(operation)

    @staticmethod
    def check_may_be_half(half_a_step: bool, name: str) -> None:
        """Nothing but a step may leave half of one."""
        assert not half_a_step or name in ("step", "closure"), f"{name} has left half a step"

    def take_what_came_early(self, *, adopts: bool) -> None:
        """Masters may be made before the call that failed, and weights that were written adopted.

        Args:
            adopts: Whether the operation does.
        """
        model = self.model
        for i in EVERY:
            master = self.optimizer.state.get(self.params[i], {}).get("master")
            if master is None:
                continue
            model.made.add(i)
            adopted = model.after_adoption(i)
            if adopts and adopted.holds(flat(master)):
                model.masters[i] = adopted


def play(engine: Engine, sequence: Sequence) -> None:
    """Raises an AssertionError with the shortest sequence that fails like this one.

    Replay it by hand: `play(Engine("reference", "fused"), Sequence(...))`.
    """
    failure = failure_of(engine, sequence)
    if failure is None:
        return
    sequence, failure = shrunk(engine, sequence, failure)
    raise AssertionError(f"{engine}: {failure}\n{sequence}") from failure


def failure_of(engine: Engine, sequence: Sequence) -> BaseException | None:
    """What goes wrong, or None."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            player = Play(engine, sequence.optimizer, sequence.scale, patch)
            for operation in (*sequence.operations, ("read",)):
                player.do(operation)
        except (Exception, Injected, pytest.fail.Exception) as failure:
            return failure
    return None


def shrunk(
    engine: Engine, sequence: Sequence, failure: BaseException
) -> tuple[Sequence, BaseException]:
    """Leaves out operations as long as anything goes wrong."""
    place = len(sequence.operations) - 1
    while place >= 0:
        shorter = sequence.without(place)
        found = failure_of(engine, shorter)
        if found is not None:
            sequence, failure = shorter, found
        place -= 1
    return sequence, failure
