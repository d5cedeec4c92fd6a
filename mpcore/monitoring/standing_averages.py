"""Averages of 16-bit weights that are kept in 16 bits: found, and told if they stand still."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpcore.base import SIXTEEN_BIT
from mpcore.optim import AveragedModel

#: Values that are looked at, of each parameter; evenly spaced.
_SAMPLE = 256
#: Places that an average is away from its weight, times updates, after which one in float32 has
#: moved by more than one even with a decay of 0.9999, from half of the way on average.
_OVERDUE = 3e4
_MOST = 0.5  # share of such values that stand still


class _Copy(NamedTuple):
    """A module that is like the model, as it was when it was found."""

    module: weakref.ref[nn.Module]
    values: Tensor
    writes: int


class StandingAverages:
    """Looks for other modules like a model whose 16-bit weights are written to, and do not move.

    Args:
        model: Whose averages; None has none.

    Example:
        >>> print(StandingAverages(nn.Linear(2, 1)).look())
        None
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._copies: list[_Copy] = []
        self._looks = 0

    @torch.no_grad()
    def look(self) -> str | None:
        """Returns what to say of the first that stands still; syncs if there are any.

        It searches in the looks 1, 2, 4, 8 and so on, which go through all objects: a tenth of
        a second for a million.
        """
        model = self._model
        weights = [] if model is None else _narrow(model)
        if model is None or not weights:
            return None
        self._looks += 1
        now = _sampled(weights) if self._copies else None
        found = [text for copy in self._copies if (text := _standing(copy, weights, now))]
        if self._looks & (self._looks - 1) == 0:
            self._search(model, weights)
        return found[0] if found else None

    def _search(self, model: nn.Module, weights: list[Tensor]) -> None:
        known = {id(copy.module()) for copy in self._copies} | {id(model)}
        kinds = (nn.Module, torch.optim.Optimizer)
        found = [one for one in gc.get_objects() if issubclass(type(one), kinds)]
        modules = [m for m in found if isinstance(m, nn.Module) and "_parameters" in vars(m)]
        # without these a module is half made; what an optimizer steps is trained
        stepped = _stepped(one for one in found if isinstance(one, torch.optim.Optimizer))
        # of ours the averages are float32, and the module only shows them
        known |= {id(one.module) for one in modules if isinstance(one, AveragedModel)}
        like = [(weight.dtype, weight.shape) for weight in weights]
        own = {weight.data_ptr() for weight in weights}
        types = set(map(type, model.modules()))  # a copy may be of what the model wraps
        for module in modules:
            if id(module) in known or type(module) not in types:
                continue
            params = _narrow(module)
            # what has gradients of its own is another model that is trained
            mine = list(module.parameters())
            trained = any(param.grad is not None or id(param) in stepped for param in mine)
            if trained or [(p.dtype, p.shape) for p in params] != like:
                continue
            # an average begins as its model, or close to it
            if not _is_close(_sampled(params), _sampled(weights)):
                continue
            if not any(param.data_ptr() in own for param in params):
                writes = sum(param._version for param in params)
                self._copies.append(_Copy(weakref.ref(module), _sampled(params), writes))


def _standing(copy: _Copy, weights: list[Tensor], now: Tensor | None) -> str | None:
    """Returns what to say of a copy, None if nothing is wrong with it."""
    module = copy.module()
    params = [] if module is None else _narrow(module)
    values = _sampled(params)
    if now is None or values.shape != now.shape:
        return None
    updates = (sum(param._version for param in params) - copy.writes) // max(len(params), 1)
    places = torch.finfo(params[0].dtype).eps
    away = (now - values).abs() / (values.abs() * places)  # infinite at 0, which is left out
    overdue = away.isfinite() & (away * updates > _OVERDUE)
    late = int(overdue.sum())
    still = int((overdue & (values == copy.values)).sum())
    if not late or still <= _MOST * late:
        return None
    return (
        f"An average of the model's weights is kept in {str(weights[0].dtype)[6:]} and stands "
        f"still: in {updates} updates {still} of {late} values that are far from their weights "
        "have not moved, since what an update adds is less than half a last place. Average the "
        "float32 masters: mpcore.AveragedModel(model, optimizer, ...) takes what "
        "torch.optim.swa_utils.AveragedModel takes."
    )


def _stepped(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    """Returns the ids of all parameters of optimizers, as far as these are made."""
    groups = [group for one in optimizers for group in vars(one).get("param_groups", ())]
    return {id(param) for group in groups for param in group["params"]}


def _narrow(module: nn.Module) -> list[Tensor]:
    plain = [param for param in module.parameters() if type(param) is nn.Parameter]
    return [p.detach() for p in plain if p.dtype in SIXTEEN_BIT and p.numel() and not p.is_meta]


def _is_close(values: Tensor, weights: Tensor) -> bool:
    """Whether most values have the signs of the weights, and sizes within a factor of 8."""
    sizes, others = values.abs(), weights.abs()
    near = (values * weights > 0) & (sizes <= 8 * others) & (others <= 8 * sizes)
    near |= values == weights
    return bool(near.float().mean() > _MOST)


def _sampled(params: list[Tensor]) -> Tensor:
    """Returns some values of all, float32 on the host; syncs once for each device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for param in params:
        by_device.setdefault(param.device, []).append(_some(param).float())
    return torch.cat([torch.zeros(0), *(torch.cat(some).cpu() for some in by_device.values())])


def _some(param: Tensor) -> Tensor:
    return param.reshape(-1)[:: max(1, param.numel() // _SAMPLE)]
