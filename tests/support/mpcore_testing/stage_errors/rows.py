"""Every `StageError` of the engine, once for each remedy that its message names."""

from __future__ import annotations

from mpcore_testing.stage_errors.inner import WRAPPED
from mpcore_testing.stage_errors.kept import KEPT
from mpcore_testing.stage_errors.scaling import SCALING
from mpcore_testing.stage_errors.turns import OUT_OF_TURN
from mpcore_testing.stage_errors.two_calls import TWO_CALLS
from mpcore_testing.stage_errors.weights import WEIGHTS

ROWS = [*SCALING, *OUT_OF_TURN, *KEPT, *WEIGHTS, *WRAPPED, *TWO_CALLS]
