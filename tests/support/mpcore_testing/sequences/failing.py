"""A backend that fails at one of its calls, before it or after it has done its work."""

from __future__ import annotations

from typing import Any


class Injected(BaseException):
    """What it raises; like a KeyboardInterrupt it is no `Exception`."""


class Failing:
    """Hands every call on.

    Args:
        backend: A real one.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._left = -1  # calls until it fails; below 0 never
        self._when = ""

    def arm(self, call: int, when: str) -> None:
        """Lets call number `call` from now on fail, "before" or "after" its work."""
        self._left, self._when = call, when

    def disarm(self) -> None:
        self._left = -1

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._backend, name)

        def call(*args: Any, **options: Any) -> Any:
            fails, self._left = self._left == 0, self._left - 1
            if fails and self._when == "before":
                raise Injected
            result = real(*args, **options)
            if fails:
                raise Injected
            return result

        return call
