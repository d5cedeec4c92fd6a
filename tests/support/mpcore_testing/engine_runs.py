"""Steps of the whole engine over gradients that are given, to be taken by several backends."""

import mpcore
import torch
from mpcore.optim import Lion

OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True, maximize=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, dampening=0.25),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1, lr_decay=0.1),
    "Lion": lambda groups: Lion(groups, lr=0.01, weight_decay=0.1),
}
OVERFLOWS = {0, 4}


class Training:
    """An engine over weights of two shapes; a third one stays float32, as norms do.

    Args:
        build: Makes the optimizer of param groups.
        dtype: Of the first two weights.
        backend: The name of one.
        float32: Whether there is a third weight.
        device: Of the weights.
        rule: For weights that others write to.
    """

    def __init__(self, build, dtype, backend, *, float32, device, rule="adopt"):
        generator = torch.Generator().manual_seed(0)
        shapes = [(5, 3), (4099,), *([(7,)] if float32 else [])]
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        dtypes = [dtype, dtype, torch.float32]
        self.params = [
            torch.nn.Parameter(value.to(device, kind))
            for value, kind in zip(values, dtypes, strict=False)
        ]
        groups = [{"params": self.params[:1]}, {"params": self.params[1:], "lr": 0.003}]
        self.optimizer = mpcore.MixedPrecisionOptimizer(
            build(groups),
            mpcore.DynamicLossScale(init=256.0, growth_interval=2),
            backend=backend,
            path="fused",
            on_weight_edit=rule,
        )
        self.loss = torch.ones((), device=device)

    def load(self, number, *, in_place=False):
        """Makes the scaled gradients of a step, new tensors or in those of the last step."""
        generator = torch.Generator().manual_seed(number)
        loss_scale = self.optimizer.loss_scale
        for param in self.params:
            grad = torch.randn(param.shape, generator=generator) * loss_scale
            grad[0] = torch.inf if number in OVERFLOWS else grad[0]
            if in_place:
                param.grad.copy_(grad)
            else:
                param.grad = grad.to(param)
        self.optimizer.scale(self.loss)

    def step(self, max_norm=None):
        """Takes a step over the gradients that are there."""
        if max_norm is not None:
            self.optimizer.clip_grad_norm_(max_norm)
        self.optimizer.step()

    def tensors(self):
        """Returns every parameter and all that the optimizer keeps of it."""
        states = [self.optimizer.state[param] for param in self.params]
        kept = [state[key] for state in states for key in sorted(state)]
        return [param.detach() for param in self.params] + kept
