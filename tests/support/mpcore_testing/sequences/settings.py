"""The optimizers and loss scales of the sequences, as torch and mpcore have them."""

from __future__ import annotations

from typing import Any

import mpcore
import torch

from mpcore_testing.sequences.optimizers import ALPHA, BETAS, DECAY, MOMENTUM, RATE_DECAY, RATES
from mpcore_testing.sequences.scales import FIRST

#: Short intervals, so that a few steps move them.
SCALES = {
    "dynamic": mpcore.DynamicLossScale(FIRST, growth_interval=2, max_scale=2.0**12),
    "hysteresis": mpcore.DynamicLossScale(
        FIRST, growth_interval=1, hysteresis=2, min_scale=2.0, max_scale=2.0**12
    ),
    "static": mpcore.StaticLossScale(FIRST),
    "headroom": mpcore.HeadroomLossScale(FIRST, window=4, max_scale=2.0**16),
    "none": mpcore.NoLossScale(),
}
#: All that have a fused update.
FUSABLE = [name for name in RATES if name != "RMSprop"]


def build(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer itself, with the numbers from above."""
    common: dict[str, Any] = {"lr": RATES[name], "weight_decay": DECAY[name]}
    if name == "SGD":
        return torch.optim.SGD(groups, momentum=MOMENTUM, **common)
    if name == "AdamW":
        return torch.optim.AdamW(groups, betas=BETAS, **common)
    if name == "Adagrad":
        return torch.optim.Adagrad(groups, lr_decay=RATE_DECAY, **common)
    if name == "Lion":
        return mpcore.optim.Lion(groups, betas=BETAS, **common)
    return torch.optim.RMSprop(groups, alpha=ALPHA, **common)
