"""Seeded errors: each one is a change of one piece of text that the test suite must notice."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """What is changed where, and which tests should fail.

    `text` must occur exactly once in `file`; `tests` are files under tests/kernels, the likeliest
    first, or `audit NAME` for an error that only the machine code shows.
    """

    file: str
    name: str
    text: str
    replacement: str
    tests: tuple[str, ...]


def mutants(file, tests, *changes):
    """Makes a mutant of each name, text and replacement in `changes`."""
    return [Mutant(file, *change, tests) for change in changes]
