"""The engine on the kernels, in random sequences of what users do."""

import pytest

from mpcore_testing.engines import Engine
from mpcore_testing.lengths import long_run
from mpcore_testing.sequences.operations import sequence
from mpcore_testing.sequences.play import play


@pytest.mark.parametrize("seeds", [range(2), long_run(range(2, 40))], ids=["few", "many"])
@pytest.mark.parametrize("path", ["general", "fused"])
def test_the_engine_on_the_kernels_does_what_the_model_of_it_does(path, seeds):
    engine = Engine("triton", path)
    for seed in seeds:
        play(engine, sequence(seed, fused=engine.fused))
