"""What `torch.optim` does not have: Lion, averages, and several optimizers as one."""

from mpcore.optim.averaged_model import AveragedModel
from mpcore.optim.chained_optimizer import ChainedOptimizer
from mpcore.optim.lion import Lion

__all__ = ["AveragedModel", "ChainedOptimizer", "Lion"]
