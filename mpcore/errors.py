"""What mpcore raises. Every message says what was expected, what was got, and what to do."""

from __future__ import annotations


class MpcoreError(Exception):
    """The base of every error that mpcore raises on purpose."""


class ArgumentError(MpcoreError, ValueError):
    """An argument has the right type and an impossible value."""


class ArgumentTypeError(MpcoreError, TypeError):
    """An argument has the wrong type."""


class LossScaleError(MpcoreError, FloatingPointError):
    """A step overflowed at the minimum of a loss scale that was told to raise then."""


class StageError(MpcoreError, RuntimeError):
    """A method was called at the wrong moment of the step."""


class RankError(MpcoreError, RuntimeError):
    """Another rank did not answer in a collective: it has ended, or is late."""


class BackendError(MpcoreError, RuntimeError):
    """A backend that was asked for by name cannot run here."""
