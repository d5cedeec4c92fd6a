"""Optimizers that `torch.optim` does not have, for `mpcore.MixedPrecisionOptimizer` or alone."""

from mpcore.optim.lion import Lion

__all__ = ["Lion"]
