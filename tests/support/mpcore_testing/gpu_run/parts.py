"""The parts of the run, their order and their shares of the time. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

#: seconds of a whole run, by mode: what is promised less a margin for ending
LIMITS = {"full": 450.0, "quick": 108.0, "rehearsal": 3600.0}


@dataclass(frozen=True)
class Part:
    """One part, run in a process of its own.

    Attributes:
        name: Of its module in this package, and its key in the JSON.
        title: Its heading.
        share: Of the time that is left when it starts, relative to the parts after it.
    """

    name: str
    title: str
    share: float


PARTS = (
    Part("machine", "Versions and device", 1.0),
    Part("bits", "Kernels against the reference", 5.0),
    Part("engine", "Whole steps of the engine", 3.0),
    Part("steps", "The optimizer step", 5.0),
    Part("training", "Whole training steps", 8.0),
)


@dataclass(frozen=True)
class Sizes:
    """How much each part does.

    Attributes:
        mode: "full", "quick" or "rehearsal".
        values: Elements of the inputs made of random bits.
        lengths: Elements of the tensors that are updated.
        every_option: Whether updates run with every set of options, or one for each rule.
        combinations: Of how many combinations of gradient and weight.
        lists: Parameter lists of the timed step, as `mpcore.bench.shapes.parse` takes them.
        rounds: Interleaved timed steps.
        models: Models that are trained: names in `mpcore_testing.gpu_run.models.MODELS`.
        checked: Training steps whose losses are compared.
        timed: Training steps that are timed.
    """

    mode: str
    values: int
    lengths: tuple[int, ...]
    every_option: bool
    combinations: int
    lists: tuple[str, ...]
    rounds: int
    models: tuple[str, ...]
    checked: int
    timed: int


_SMALL = (0, 7)
SIZES = {
    "full": Sizes(
        *("full", 2**20, (*_SMALL, 4095, 4096, 4097, 300_007), True, 5),
        *(("gpt2", "1G"), 21, ("gpt2", "1.3b"), 8, 12),
    ),
    "quick": Sizes(
        *("quick", 2**18, (*_SMALL, 4097, 100_003), False, 3, ("gpt2",), 11, ("gpt2",), 5, 6),
    ),
    "rehearsal": Sizes(
        *("rehearsal", 2**10, (*_SMALL, 300), False, 1, ("5K",), 1, ("tiny",), 2, 1),
    ),
}
