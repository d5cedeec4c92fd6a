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

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def float32_state(self, param: Tensor) -> dict[str, Any]: ...


class AveragedModel(nn.Module):
    """Averages masters in float32, and runs as the model does with the average, rounded.

    `torch.optim.swa_utils.AveragedModel` over 16-bit weights stands still: with a decay of 0.9995
    an average moves by a 2,000th of its distance from the weight, which is less than half its last
    place in float16 and bfloat16, and rounds away. This one takes the same arguments and the
    optimizer that has the masters. Weights without a master, as those that are frozen and all
    before the first step, count as they are.

    `module` is a copy of the model, casts and all, with the averages rounded to the dtypes of its
    weights: for evaluation. `state_dict` has both, so that averaging goes on with the same bits.

    `copy.deepcopy` and pickles copy the optimizers too: copy model, optimizers and average in one
    tuple. A copy of the average alone evaluates and saves, and refuses to average the original
    model; for a second average of that, make a new one and load the `state_dict`.

    Args:
        model: Whose weights are averaged.
        optimizer: A `MixedPrecisionOptimizer` of them, or several in a list. Together they have
            all 16-bit parameters that require a gradient.
        device: Where the averages are; by default where the weights are.
        avg_fn: As in torch; `get_ema_avg_fn(0.999)` for example.
        multi_avg_fn: As in torch. Without either, all models count the same.
        use_buffers: Whether to average buffers too. Otherwise they are the model's last, or what
            `torch.optim.swa_utils.update_bn(loader, average)` makes of them afterwards.

    Raises:
        ArgumentTypeError: `model` is no module, or an optimizer has no `state` or `param_groups`.
        ArgumentError: No optimizer has a 16-bit parameter that requires a gradient, or there are
            both `avg_fn` and `multi_avg_fn`.

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
        self._optimizers = list(_all([optimizer] if hasattr(optimizer, "state") else optimizer))
        self._check_optimized(model)
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
        """Takes the masters of a model into the average; syncs as torch's does, to count.

        Raises:
            ArgumentError: No optimizer has a 16-bit parameter that requires a gradient.
        """
        self.averages.update_parameters(self._values_of(model))
        averages = self.averages.module
        _round_into(self.module, averages.parameters(), averages.buffers())

    def float32_state_dict(self) -> dict[str, Any]:
        """Returns `module.state_dict()` with the averages in float32; no sync.

        16-bit buffers are float32 as well, and of `module` unless they are averaged. Tied weights
        and extra state are there as the model has them. Load it into a model before `cast_model`.
        """
        own = [*self.module.parameters(), *self.module.buffers()]
        wide = [*self.averages.module.parameters(), *map(_widened, self._shown_buffers())]
        average_of = {id(tensor): value for tensor, value in zip(own, wide, strict=True)}
        values = self.module.state_dict(keep_vars=True)
        for name, value in list(values.items()):
            if isinstance(value, Tensor):
                values[name] = average_of.get(id(value), value).detach()
        return values

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Puts the average, rounded, and its buffers into a model for a while; no host sync.

        Afterwards the model has the bits that it had: its masters lose nothing. Do not step inside.
        """
        tensors = [*model.parameters(), *model.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        try:
            _round_into(model, self.averages.module.parameters(), self._shown_buffers())
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)

    def _shown_buffers(self) -> Iterator[Tensor]:
        """Returns the averages of buffers, or those of `module`, which `update_bn` writes to."""
        return (self.averages if self.averages.use_buffers else self).module.buffers()

    def _values_of(self, model: nn.Module) -> _Values:
        self._check_optimized(model)

        def master_of(param: Tensor) -> Tensor:
            for optimizer in self._optimizers:
                entry = optimizer.state.get(param)
                if entry is not None and "master" in entry:
                    master: Tensor = entry["master"]
                    return master
                if entry is not None and "remainder" in entry:
                    decoded: Tensor = optimizer.float32_state(param)["master"]
                    return decoded
            return _widened(param)

        return _Values(map(master_of, model.parameters()), map(_widened, model.buffers()))

    def _check_optimized(self, model: nn.Module) -> None:
        """Raises if a parameter has its master, now or later, in an optimizer that is not here."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        held = {id(param) for group in groups for param in group["params"]}
        for name, param in model.named_parameters():
            if param.dtype in _SIXTEEN_BIT and param.requires_grad and id(param) not in held:
                raise ArgumentError(
                    "AveragedModel: expected each 16-bit parameter that requires a gradient in an "
                    f"optimizer given, got {name!r} ({param.dtype}) in none; its average would be "
                    "of rounded weights. Give the optimizers that step this model, all in a list, "
                    "and freeze what none steps by requires_grad_(False). If the average is a "
                    "copy, or was loaded whole, its optimizer is a copy too: copy model, "
                    "optimizer and average in one tuple, or make a new AveragedModel and load "
                    "the state_dict of the old one."
                )


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
def _round_into(model: nn.Module, params: Iterable[Tensor], buffers: Iterable[Tensor]) -> None:
    """Writes values to the tensors of a model, as masters are: rounded and saturated."""
    tensors = (*model.parameters(), *model.buffers())
    for tensor, value in zip(tensors, (*params, *buffers), strict=True):
        if tensor.dtype in _SIXTEEN_BIT:
            limits = torch.finfo(tensor.dtype)
            bounded = value.clamp(limits.min, limits.max)
            value = torch.where(value.isinf(), value, bounded)  # those of masks
        tensor.copy_(value)


def _all(optimizers: Any) -> Iterator[_Optimizer]:
    for one in optimizers if isinstance(optimizers, Iterable) else [optimizers]:
        if not (hasattr(one, "state") and hasattr(one, "param_groups")):
            raise ArgumentTypeError(
                "optimizer: expected a MixedPrecisionOptimizer, or several in a list, got "
                f"{_type(one)}."
            )
        yield one


def _type(value: object) -> str:
    return type(value).__name__
