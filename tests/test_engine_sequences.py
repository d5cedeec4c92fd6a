"""Random sequences of everything that a user does, on each engine beside a float64 model of it.

The model is in `mpcore_testing.sequences`: plain NumPy that imports nothing of mpcore. After each
operation gradients, weights, masters, moments, the loss scale and its counters are compared.
"""

from __future__ import annotations

import pytest

from mpcore_testing.engines import ENGINES, Engine
from mpcore_testing.lengths import long_run
from mpcore_testing.sequences.operations import sequence
from mpcore_testing.sequences.play import play

#: Sequences of each engine: in `make test`, and once more in `make test-exhaustive`.
FEW, MANY = 17, 1000


@pytest.mark.parametrize("many", [False, long_run(True)], ids=["few", "many"])
@pytest.mark.parametrize("number", range(len(ENGINES)), ids=map(str, ENGINES))
def test_an_engine_does_what_the_model_of_it_does(number: int, many: bool) -> None:
    engine: Engine = ENGINES[number]
    for seed in range(MANY) if many else range(number * FEW, (number + 1) * FEW):
        play(engine, sequence(seed, fused=engine.fused))
