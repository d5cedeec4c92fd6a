"""Whether masters, weights and state are those of one step, or an exception left half of one."""

from __future__ import annotations

from mpcore.errors import StageError


class Writes:
    """Begun by the first write of a step or a load, ended by its last.

    Attributes:
        begun: Whether it has begun and not ended: outside of a call, an exception came between.
    """

    def __init__(self) -> None:
        self.begun = False

    def begin(self) -> None:
        """Notes that what comes next may write."""
        self.begun = True

    def end(self) -> None:
        """Notes that everything is whole: all was written, or all was undone."""
        self.begun = False

    def check(self, caller: str) -> None:
        """Raises if an exception has left half a step."""
        if self.begun:
            raise StageError(
                f"{caller}: expected whole masters and state, got what an exception in the middle "
                "of step() or load_state_dict() has left. Load a checkpoint: load_state_dict() of "
                "this optimizer, and of the model."
            )
