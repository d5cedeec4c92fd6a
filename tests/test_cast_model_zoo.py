"""One step of models of many kinds in FP16 and in BF16, beside the same step in FP32."""

from __future__ import annotations

import pytest
import torch

from mpcore_testing.steps_in_16_bits import HALF, check
from mpcore_testing.zoo import rows

ROWS = rows()


@pytest.mark.filterwarnings("ignore:cast_model. the forward pass writes")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm`:FutureWarning")
@pytest.mark.parametrize("batch", [False, True], ids=["", "batch"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_a_step_is_that_of_fp32_but_for_roundings(
    name: str, dtype: torch.dtype, batch: bool
) -> None:
    check(ROWS[name], dtype, batch)
