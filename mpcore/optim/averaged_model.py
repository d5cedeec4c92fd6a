"""`AveragedModel`: averages of FP32 masters (EMA, SWA) for models whose weights have 16 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from mpcore.errors import ArgumentError, ArgumentTypeError

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


class _Optimizer(Protocol):
    @property
    def state(self) -> Mapping[Any, Any]: ...


class AveragedModel(nn.Module):
    """Averages masters in float32, and runs as the model does with the average, rounded.

    `torch.optim.swa_utils.AveragedModel` over 16-bit weights stands still: with a decay of 0.9995
    an average moves by a 2,000th of its distance from the weight, which is less than half its last
    place in float16 and bfloat16, and rounds away. This one takes the same arguments and the
    optimizer that has the masters. Weights without a master count as they are.

    `module` is a copy of the model, casts and all, with the averages rounded to the dtypes of its
    weights: for evaluation. `state_dict` has both, so that averaging goes on with the same bits.

    Args:
        model: Whose weights are averaged.
        optimizer: A `MixedPrecisionOptimizer` of them, or several in a list.
        device: Where the averages are; by default where the weights are.
        avg_fn: As in torch; `get_ema_avg_fn(0.999)` for example.
        multi_avg_fn: As in torch. Without either, all models count the same.
        use_buffers: Whether to average buffers too. Otherwise they are the model's last.

    Raises:
        ArgumentTypeError: `model` is no module, or an optimizer has no `state`.

    Example:
        >>> import torch, mpcore
        >>> model = torch.nn.Linear(1, 1, bias=False).bfloat16()
        >>> optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
        >>> average = mpcore.AveragedModel(model, optimizer, multi_avg_fn=ema)
        >>> average.update_parameters(model)
        >>> average.module.weight.dtype, average.float32_state_dict()["weight"].dtype
        (torch.bfloat16, torch.float32)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: _Optimizer | Iterable[_Optimizer],
        device: torch.device | str | int | None = None,
        avg_fn: Callable[..., Tensor] | None = None,
        multi_avg_fn: Callable[..., None] | None = None,
        use_buffers: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model: expected a torch.nn.Module, got {_type(model)}.")
        if avg_fn is not None and multi_avg_fn is not None:
            raise ArgumentError("avg_fn, multi_avg_fn: expected at most one of them, got both.")
        optimizers = [optimizer] if hasattr(optimizer, "state") else list(_all(optimizer))
        self._optimizers = optimizers
        self.module = copy.deepcopy(model)
        if device is not None:
            self.module.to(device)
        #: torch's own, over float32 values
        self.averages = swa_utils.AveragedModel(
            self._values_of(model),
            device=None if device is None else torch.device(device),
            avg_fn=avg_fn,
            multi_avg_fn=multi_avg_fn,
            use_buffers=use_buffers,
        )

    @property
    def n_averaged(self) -> Tensor:
        """How many models are in the average."""
        return self.averages.n_averaged

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the model would, with averaged weights."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes the masters of a model into the average; syncs as torch's does, to count."""
        self.averages.update_parameters(self._values_of(model))
        _round_into(self.module, self.averages.module)

    def float32_state_dict(self) -> dict[str, Tensor]:
        """Returns the averages under the names of the model's parameters and buffers; no sync.

        16-bit buffers are float32 as well. Load it into a model before `cast_model`.
        """
        tensors = [*self.averages.module.parameters(), *self.averages.module.buffers()]
        names = [
            name for name, _ in (*self.module.named_parameters(), *self.module.named_buffers())
        ]
        by_name = dict(zip(names, tensors, strict=True))
        kept = {name.removeprefix("module.") for name in self.module.state_dict()}
        return {name: tensor.detach() for name, tensor in by_name.items() if name in kept}

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Puts the average, rounded, into a model for a while; no host sync.

        Afterwards the model has the bits that it had: its masters lose nothing. Do not step inside.
        """
        tensors = [*model.parameters(), *model.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        try:
            _round_into(model, self.averages.module)
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)

    def _values_of(self, model: nn.Module) -> _Values:
        def master_of(param: Tensor) -> Tensor:
            for optimizer in self._optimizers:
                entry = optimizer.state.get(param)
                if entry is not None and "master" in entry:
                    master: Tensor = entry["master"]
                    return master
            return _widened(param)

        return _Values(map(master_of, model.parameters()), map(_widened, model.buffers()))


class _Values(nn.Module):
    """Tensors in a row, as parameters and buffers of a module, which torch's averages take."""

    def __init__(self, params: Iterable[Tensor], buffers: Iterable[Tensor]) -> None:
        super().__init__()
        for at, value in enumerate(params):
            self.register_parameter(f"p{at}", nn.Parameter(value.detach(), requires_grad=False))
        for at, value in enumerate(buffers):
            self.register_buffer(f"b{at}", value.detach())


def _widened(tensor: Tensor) -> Tensor:
    return tensor.detach().float() if tensor.dtype in _SIXTEEN_BIT else tensor.detach()


@torch.no_grad()
def _round_into(model: nn.Module, values: nn.Module) -> None:
    """Writes values to the tensors of a model, as masters are: rounded and saturated."""
    pairs = zip(
        (*model.parameters(), *model.buffers()),
        (*values.parameters(), *values.buffers()),
        strict=True,
    )
    for tensor, value in pairs:
        if tensor.dtype in _SIXTEEN_BIT:
            limits = torch.finfo(tensor.dtype)
            bounded = value.clamp(limits.min, limits.max)
            value = torch.where(value.isinf(), value, bounded)  # those of masks
        tensor.copy_(value)


def _all(optimizers: Any) -> Iterator[_Optimizer]:
    for one in optimizers if isinstance(optimizers, Iterable) else [optimizers]:
        if not hasattr(one, "state"):
            raise ArgumentTypeError(
                "optimizer: expected a MixedPrecisionOptimizer, or several in a list, got "
                f"{_type(one)}."
            )
        yield one


def _type(value: object) -> str:
    return type(value).__name__
