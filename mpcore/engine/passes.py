"""What was heard of backward passes since the last step: a value, replaced and never changed."""

from __future__ import annotations

from typing import NamedTuple


class Passes(NamedTuple):
    """Backward passes since the last step.

    Attributes:
        scaled: Whether a loss went through `scale()`.
        thrown: Whether what it left was thrown away since.
        zeroed: Whether gradients are zeros that `zero_grad()` has left.

    Example:
        >>> Passes.begun().wait, Passes.begun().cleared(zeros=True).wait
        (True, False)
        >>> Passes.begun().stepped()
        Passes(scaled=False, thrown=False, zeroed=False)
    """

    scaled: bool = False
    thrown: bool = False
    zeroed: bool = False

    @classmethod
    def begun(cls) -> Passes:
        """Returns what is so once a loss was scaled, whatever was before."""
        return cls(scaled=True)

    @property
    def wait(self) -> bool:
        """Whether gradients of a scaled loss may wait for a step."""
        return self.scaled and not self.zeroed

    def stepped(self) -> Passes:
        """Returns what is so after a step."""
        return Passes(scaled=False, thrown=self.thrown, zeroed=self.zeroed)  # in every step

    def cleared(self, *, zeros: bool) -> Passes:
        """Returns what is so once gradients were cleared, to zeros or to None."""
        return self._replace(zeroed=zeros)

    def thrown_away(self, *, begun: bool) -> Passes:
        """Returns what is so once a step that nobody took was ended.

        Args:
            begun: Whether the backward pass of what was scaled has.
        """
        return self._replace(thrown=begun)
