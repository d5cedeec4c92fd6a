"""A model that is run for a look, and is as before afterwards."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class LeftAlone:
    """Puts back what a forward and a backward pass change in a model, also after an exception.

    Gradients, buffers, attributes of modules, random number generators (torch's, Python's and
    NumPy's), and weights that `save` hears of before something writes to them. Hooks that wait for
    gradients of parameters, those of optimizers for example, do not run meanwhile.

    Args:
        model: Any.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with LeftAlone(model):
        ...     _ = model(torch.ones(3, 2))
        >>> model.running_mean
        tensor([0., 0.])
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._saved: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._stack: list[Any] = []

    def __enter__(self) -> LeftAlone:
        model = self._model
        params = list(model.parameters())
        self._params = {p.untyped_storage().data_ptr(): p for p in params if _has_memory(p)}
        self._grads: list[tuple[Tensor, Tensor | None]] = []
        self._hooks: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        # a cast puts other memory behind the same tensors
        self._data = [(tensor, tensor.data) for tensor in (*params, *model.buffers())]
        self._modules = [_Contents(module) for module in model.modules()]
        devices = {param.device for param in params if param.device.type == "cuda"}
        self._numbers = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else (numpy.random, numpy.random.get_state())
        self._stack = [
            torch.inference_mode(False),
            torch.random.fork_rng(devices=list(devices)),
            torch.enable_grad(),
        ]
        for manager in self._stack:
            manager.__enter__()
        self.expect(params)
        return self

    def expect(self, leaves: Iterable[Tensor]) -> None:
        """Hears of tensors that are going to get gradients, those of a loss with weights too."""
        known = {id(leaf) for leaf, _ in self._grads}
        for leaf in leaves:
            if id(leaf) in known:
                continue
            self._grads.append((leaf, leaf.grad))
            leaf.grad = None
            waiting = leaf._post_accumulate_grad_hooks
            if waiting:
                self._hooks.append((waiting, dict(waiting)))
                waiting.clear()

    def save(self, tensor: Tensor) -> None:
        """Hears that a tensor is going to be written to; copies it if it is a weight."""
        if not _has_memory(tensor):
            return
        key = tensor.untyped_storage().data_ptr()
        if key in self._params and key not in self._saved:
            param = self._params[key]
            self._saved[key] = param, param.detach().clone()

    def __exit__(self, *error: object) -> None:
        for manager in reversed(self._stack):
            manager.__exit__(None, None, None)
        for waiting, hooks in self._hooks:
            waiting.update(hooks)
        random.setstate(self._numbers)
        if self._numpy is not None:
            self._numpy[0].set_state(self._numpy[1])
        for module in self._modules:
            module.put_back()
        for tensor, data in self._data:
            moved = _has_memory(tensor) and tensor.data_ptr() != data.data_ptr()
            if moved or tensor.dtype != data.dtype:
                tensor.data = data
        for leaf, grad in self._grads:
            leaf.grad = grad
        values = (pair for module in self._modules for pair in module.tensors)
        with torch.no_grad():
            for tensor, value in (*self._saved.values(), *self._buffers, *values):
                _put_back(tensor, value)


class _Contents:
    """What a module holds by name: parameters, buffers, parts, hooks, and all other attributes."""

    def __init__(self, module: nn.Module) -> None:
        self._here = module.__dict__
        self._attributes = dict(self._here)
        inside = [held for held in self._here.values() if type(held) in (dict, OrderedDict)]
        self._inside = [(held, held.copy()) for held in inside]
        lists = [held for held in self._here.values() if type(held) is list]
        self._lists = [(held, list(held)) for held in lists]
        tensors = [held for held in self._here.values() if isinstance(held, Tensor)]
        self.tensors = [(t, t.detach().clone()) for t in tensors if not t.requires_grad]
        others = [held for held in self._here.values() if type(held) in (set, deque)]
        self._others = [(held, held.copy()) for held in others]

    def put_back(self) -> None:
        """Puts everything back, the same objects under the same names."""
        for here, before in ((self._here, self._attributes), *self._inside):
            if [*here] != [*before] or any(here[name] is not before[name] for name in here):
                here.clear()
                here.update(before)
        for held, items in self._lists:
            held[:] = items
        for others, before in self._others:
            if others != before:
                others.clear()
                (others.update if isinstance(others, set) else others.extend)(before)


def _put_back(tensor: Tensor, value: Tensor) -> None:
    """Writes a value back; of an expanded tensor to each place in memory once."""
    spread = (
        zip(tensor.shape, tensor.stride(), strict=True) if tensor.layout == torch.strided else ()
    )
    once = tuple(slice(0, 1) if stride == 0 and n else slice(None) for n, stride in spread)
    (tensor[once] if once else tensor).copy_(value[once] if once else value)


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and type(tensor) in (nn.Parameter, Tensor)
