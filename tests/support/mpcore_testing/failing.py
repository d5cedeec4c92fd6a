"""A backend that fails at one of its calls, before it or after it has done its work."""

from __future__ import annotations

from typing import Any


class Failing:
    """Hands every call on.

    Args:
        backend: A real one.

    Attributes:
        backend: It.
        calls: How many there were.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.calls = 0
        self._fails_at: tuple[int, str, type[BaseException]] | None = None

    def arm(self, call: int, when: str, error: type[BaseException]) -> None:
        """Lets the call after `call` others from now on raise, "before" or "after" its work."""
        self._fails_at = (self.calls + call, when, error)

    def disarm(self) -> None:
        """Lets every call succeed."""
        self._fails_at = None

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.backend, name)

        def call(*args: Any, **options: Any) -> Any:
            number, self.calls = self.calls, self.calls + 1
            at, when, error = self._fails_at or (-1, "", Exception)
            if number == at and when == "before":
                raise error("injected")
            result = real(*args, **options)
            if number == at:
                raise error("injected")
            return result

        return call
