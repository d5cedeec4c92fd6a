"""What `torch.optim` does not have, for `mpcore.MixedPrecisionOptimizer`: Lion, and averages."""

from mpcore.optim.averaged_model import AveragedModel
from mpcore.optim.lion import Lion

__all__ = ["AveragedModel", "Lion"]
