"""Seeded errors: each one is a change of one piece of text that the test suite must notice."""

from typing import NamedTuple


class Part(NamedTuple):
    """A part of the sources and the tests of it: folders of the repository.

    Attributes:
        title: What it is called on the page of results.
        source: Where the files of its mutants are.
        tests: Where their tests are.
    """

    title: str
    source: str
    tests: str


KERNELS = Part("Kernels", "kernels/mpcore_kernels", "tests/kernels")
ENGINE = Part("Engine", "mpcore", "tests")


class Mutant(NamedTuple):
    """What is changed where, and which tests should fail.

    `text` must occur exactly once in `file`; `file` and `tests` are relative to the folders of
    `part`. `tests` are files, the likeliest first, or `audit NAME` for an error that only the
    machine code of kernels shows.
    """

    file: str
    name: str
    text: str
    replacement: str
    tests: tuple[str, ...]
    part: Part

    @property
    def path(self) -> str:
        """The changed file, from the root of the repository."""
        return f"{self.part.source}/{self.file}"

    @property
    def checks(self) -> tuple[str, ...]:
        """The tests, from the root of the repository; an audit as it is."""
        return tuple(
            name if name.startswith("audit ") else f"{self.part.tests}/{name}"
            for name in self.tests
        )


def mutants(file, tests, *changes, part=KERNELS):
    """Makes a mutant of each name, text and replacement in `changes`."""
    return [Mutant(file, *change, tests, part) for change in changes]


def engine_mutants(file, tests, *changes):
    """Makes mutants of the engine."""
    return mutants(file, tests, *changes, part=ENGINE)
