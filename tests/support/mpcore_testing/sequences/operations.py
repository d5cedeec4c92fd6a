"""Random sequences of what users do to an optimizer: lists that can be printed, cut and replayed.

An operation is a tuple: its name, which is that of a method of `Play` in `play.py`, and its
arguments. Any list of them is a sequence: what is out of turn has to be refused, and what makes no
sense where it stands is left out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import inf, nan
from typing import Any

from mpcore_testing.sequences.optimizers import RATES
from mpcore_testing.sequences.settings import FUSABLE, SCALES
from mpcore_testing.sequences.state import EVERY, PARAMETERS

Operation = tuple[Any, ...]

#: What usually follows each other.
PHRASES = [
    "backward step zero_grad",
    "backward step zero_grad",
    "backward step",
    "backward backward step zero_grad",
    "backward clip step zero_grad",
    "backward unscale edit_grad step zero_grad",
    "backward unscale edit_grad clip edit_grad step",
    "backward drop unscale grads edit_grad grads step zero_grad",
    "backward unscale clip_by_torch step zero_grad",
    "backward clip unscale clip_by_torch clip step zero_grad",
    "backward clip late step drop step",
    "backward unscale drop late step zero_grad",
    "backward unscale drop_all step backward step",
    "backward unscale drop_all backward step",
    "backward unscale unscale backward accumulate step zero_grad",
    "backward accumulate backward accumulate step",
    "backward accumulate backward step zero_grad",
    "backward accumulate backward accumulate unscale edit_grad step",
    "backward accumulate backward clip drop step zero_grad",
    "backward accumulate reload backward step",
    "overflow unscale zero_grad",
    "overflow clip step zero_grad",
    "overflow unscale drop step zero_grad",
    "overflow unscale drop_all step",
    "overflow clip drop_all step backward step",
    "overflow unscale drop_all backward step",
    "backward clip drop drop drop late late step zero_grad",
    "overflow accumulate backward accumulate step",
    "overflow step backward step",
    "scale late late step zero_grad",
    "zero_grad step",
    "late step drop_all",
    "step",
    "closure closure",
    "edit_weight backward step zero_grad",
    "backward edit_weight step zero_grad",
    "backward unscale edit_weight step zero_grad",
    "edit_weight read step",
    "swap backward step swap",
    "backward step bad_weight backward step mend_weights step zero_grad",
    "edit_weight sync read step",
    "reload backward step zero_grad",
    "backward step copy edit_weight backward step zero_grad",
    "backward accumulate copy backward unscale step copy edit_weight step",
    "reload edit_weight backward step sync step",
    "save backward step zero_grad restore backward step zero_grad",
    "rate backward step zero_grad",
    "failing_backward backward step zero_grad",
    "backward raw_backward unscale raw_backward step zero_grad",
    "backward failing_hook step zero_grad",
    "inner_step read",
]
#: Those that call into the backend, any call of which may fail.
FALLIBLE = ("backward", "clip", "unscale", "accumulate", "step", "zero_grad", "closure")


@dataclass(frozen=True)
class Sequence:
    """What is done, and to what.

    Attributes:
        optimizer: A key of `mpcore_testing.sequences.optimizers.RATES`.
        scale: A key of `mpcore_testing.sequences.scales.SCALES`.
        operations: In order.
    """

    optimizer: str
    scale: str
    operations: tuple[Operation, ...]

    def __str__(self) -> str:
        lines = "".join(f"    {operation!r},\n" for operation in self.operations)
        return f"Sequence({self.optimizer!r}, {self.scale!r}, (\n{lines}))"

    def without(self, place: int) -> Sequence:
        rest = self.operations[:place] + self.operations[place + 1 :]
        return Sequence(self.optimizer, self.scale, rest)


def sequence(seed: int, *, fused: bool) -> Sequence:
    """Sequence number `seed`, of 5 to 25 operations."""
    rng = random.Random(seed)
    names: list[str] = []
    while len(names) < rng.randint(5, 25):
        for name in rng.choice(PHRASES).split():
            names.append(name)
            if rng.random() < 0.08:
                names.append(rng.choice(rng.choice(PHRASES).split()))
    operations = [_operation(rng, name) for name in names[:25]]
    kinds = FUSABLE if fused else list(RATES)
    return Sequence(rng.choice(kinds), rng.choice(list(SCALES)), tuple(operations))


def _operation(rng: random.Random, name: str) -> Operation:
    operation = (name, *ARGUMENTS.get(name, lambda _: ())(rng))
    if name == "overflow":
        operation = ("backward", *operation[1:])
    if operation[0] in FALLIBLE and rng.random() < 0.08:
        return ("fault", rng.choice([0, 0, 1, 2, 3]), rng.choice(["before", "after"]), operation)
    return operation


def _values(rng: random.Random, size: int) -> list[float]:
    """Few bits each, so that sums of them are exact in bfloat16."""
    return [rng.choice([-4, -3, -2, -1, 0, 1, 2, 3, 4]) * 0.5 for _ in range(size)]


def _gradients(rng: random.Random) -> dict[int, list[float]]:
    """Those of some parameters, of all in every second pass."""
    chosen = EVERY if rng.random() < 0.5 else rng.sample(EVERY, rng.randint(1, len(EVERY)))
    return {i: _values(rng, len(PARAMETERS[i][2])) for i in sorted(chosen)}


def _overflow(rng: random.Random) -> dict[int, list[float]]:
    grads = _gradients(rng)
    spoilt = grads[rng.choice(list(grads))]
    # the last one overflows in float16, if the scale is high enough
    spoilt[rng.randrange(len(spoilt))] = rng.choice([inf, -inf, nan, 2.0**13])
    return grads


def _some(rng: random.Random) -> int:
    return rng.choice(EVERY)


def _edit(rng: random.Random) -> Operation:
    i = _some(rng)
    kind = rng.choice(["multiply", "add", "write", "replace", "drop"])
    values = _values(rng, len(PARAMETERS[i][2]))
    if kind in ("write", "replace") and rng.random() < 0.2:
        values[0] = rng.choice([inf, nan])
    number = rng.choice([0.5, -2.0, 0.1, 3.0])
    return (i, kind, values if kind in ("write", "replace") else number)


def _weight(rng: random.Random) -> Operation:
    """One element in place, or all of them; the last kind writes what is there already."""
    return _some(rng), rng.choice(["element", "multiply", "same"]), rng.choice([0.5, -1.25, 0.3, 0])


def _late(rng: random.Random) -> Operation:
    i = _some(rng)
    values = _values(rng, len(PARAMETERS[i][2]))
    if rng.random() < 0.15:
        values[-1] = inf
    return i, values


#: What the operations of each name are given.
ARGUMENTS: dict[str, Any] = {
    "backward": lambda rng: (_gradients(rng),),
    "overflow": lambda rng: (_overflow(rng),),
    "raw_backward": lambda rng: (_gradients(rng),),
    "late": _late,
    "drop": lambda rng: (_some(rng),),
    "clip": lambda rng: (rng.choice([0.5, 2.0, 1e4]),),
    "clip_by_torch": lambda rng: (rng.choice([0.25, 1.0, 1e4]),),
    "edit_grad": _edit,
    "zero_grad": lambda rng: (rng.random() < 0.7,),
    "closure": lambda rng: (
        _overflow(rng) if rng.random() < 0.25 else _gradients(rng),
        rng.choice(["", "clip", "unscale"]),
        rng.choice(["", "", "begin", "end"]),
    ),
    "edit_weight": _weight,
    "bad_weight": lambda rng: (_some(rng), rng.choice([inf, nan])),
    "swap": lambda rng: (rng.choice([0.5, 0.9]),),
    "sync": lambda rng: (rng.random() < 0.3,),
    "reload": lambda rng: (rng.random() < 0.2,),
    "copy": lambda rng: (rng.choice(["deepcopy", "pickle"]),),
    "rate": lambda rng: (rng.choice([0, 1]), rng.choice([0.5, 2.0])),
    "failing_hook": lambda rng: (rng.choice(["before", "after"]),),
}
