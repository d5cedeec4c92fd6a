"""What torch.optim asks of an optimizer, and the masters: everything but the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mpcore.backends import resolve
from mpcore.base import all_in_memory, outside_graphs
from mpcore.checkpoint import SECTION
from mpcore.engine.wrapped_passes import WrappedPasses
from mpcore.errors import ArgumentError, BackendError
from mpcore.masters import (
    HeldMoments,
    Masters,
    check_group,
    check_original,
    check_rule,
    check_shared,
    check_store,
    hold_masters,
    name_of,
    overwrite,
    stale_weights,
    take_weights,
)


class OptimizerWrapper(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` around another one, with FP32 masters for 16-bit parameters.

    It shares its `param_groups` list with the wrapped optimizer, so that schedulers on either
    drive both. Users meet its subclass, `mpcore.MixedPrecisionOptimizer`.

    Args:
        optimizer: The wrapped optimizer, checked.
        backend: The name that was asked for.
        masters: How masters are kept.
        moments: How moments are.
        on_weight_edit: What a step does about weights that others wrote to.
    """

    #: What copies and pickles carry; a subclass adds to it, the rest follows from it.
    _kept: tuple[str, ...] = (
        *("inner", "param_groups", "defaults", "state"),
        *("_backend_asked", "_device_of", "_masters"),
    )

    _check_between_steps: Callable[[str], None]

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        backend: str,
        masters: str,
        moments: HeldMoments,
        on_weight_edit: str,
    ) -> None:
        # torch's constructor copies the groups it is given; the shared ones replace them
        super().__init__([{"params": []}], {})
        self.inner = optimizer
        self.param_groups = optimizer.param_groups
        self.defaults = optimizer.defaults
        self._device_of = {param: param.device for param in self._params()}
        self._choose_backend(backend)
        self.on_weight_edit = check_rule(on_weight_edit)
        check_store(masters, self.backend, on_weight_edit, self._params())
        self._masters = Masters(optimizer, self.state, hold_masters(masters), moments)

    @property
    def masters(self) -> str:
        """How masters lie in memory: "float32", "split" or "none"."""
        return self._masters.held.store

    @property
    def moments(self) -> str:
        """How moments lie in memory: "float32", "bfloat16" or "int8"."""
        return self._masters.moments.kept

    def _mark_groups(self) -> None:
        for group in self.param_groups:
            group.setdefault(SECTION, None)

    def _choose_backend(self, asked: str) -> None:
        params = self._params()
        devices, dtypes = {p.device for p in params}, {p.dtype for p in params}
        self._backend_asked = asked
        self.backend, self._module = resolve(asked, devices, dtypes)
        if not all_in_memory(params):
            self._module = WrappedPasses(self._module)

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _name_of(self, param: Tensor) -> str:
        return name_of(param, self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to this optimizer and the wrapped one, without a host sync.

        Args:
            param_group: As for `torch.optim.Optimizer.add_param_group`.

        Raises:
            ArgumentError: A parameter is complex, integer or there already.
            BackendError: The backend asked for by name cannot work on it.
            StageError: A step in two calls has only had its first.
        """
        if not hasattr(self, "inner"):  # torch's constructor, before the groups are shared
            super().add_param_group(param_group)
            return
        self._check_between_steps("add_param_group()")
        self._masters.take_over_edits(self.state, self.param_groups)
        group, params = check_group(param_group, self._params())
        check_store(self.masters, self.backend, self.on_weight_edit, params)
        everything = [*self._params(), *params]
        devices, dtypes = {p.device for p in everything}, {p.dtype for p in everything}
        name, _ = resolve(self._backend_asked, devices, dtypes)
        if name != self.backend:
            raise BackendError(
                f"add_param_group: expected parameters for the backend {self.backend!r}, got some "
                f"that need {name!r}. Wrap with backend={name!r}."
            )
        if not all_in_memory(params) and not isinstance(self._module, WrappedPasses):
            raise BackendError(
                "add_param_group: expected parameters with memory of their own, like those "
                "there, got DTensors or other wrappers. Wrap an optimizer over all of them."
            )
        self.inner.add_param_group(group)
        self._mark_groups()
        self._device_of.update({param: param.device for param in params})
        self._masters.link_state(params)

    @outside_graphs
    def adopt_masters(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Makes float32 originals the masters of parameters that are 16-bit now; no host sync.

        `mpcore.cast_model(model, dtype, optimizer)` calls this.

        Args:
            pairs: (parameter, original): a float16 or bfloat16 parameter of this optimizer and
                the float32 tensor of its shape and device that becomes its master, not copied.

        Raises:
            ArgumentError: A pair is not like that, or the parameter has a master already, here or,
                with other values, in another optimizer.
        """
        pairs = list(pairs)
        if len({param for param, _ in pairs}) < len(pairs):
            raise ArgumentError(
                "adopt_masters: expected every parameter once, got one in several pairs."
            )
        for param, original in pairs:
            check_original(param, original, self._device_of, self._masters)
        check_shared(self._masters, dict(pairs), self.param_groups, loaded=False)
        self._masters.take_over_edits(self.state, self.param_groups)
        for param, original in pairs:
            self._masters.create(param, original)
        self._masters.create_for([])  # what was made is noted

    @outside_graphs
    def sync_masters_from_model(
        self, weights: Mapping[str, Tensor] | None = None, *, exact: bool = False
    ) -> None:
        """Makes the weights the masters, without a host sync.

        `step` does it by itself for weights that somebody wrote to; this is for what it does not
        see (`.data`, NumPy) or does not take (a state that was loaded without its weights, numbers
        that are not finite). With `masters="split"` weights are a part of the masters: `exact`
        drops the rest, less than a last place.

        Args:
            weights: A state dict of higher precision to take instead, by parameter name; what it
                does not name stays. Weights become its values, rounded.
            exact: Overwrite every master with its weight. By default an element that is its
                rounded master keeps the digits that only the master has.

        Raises:
            ArgumentError: One of `weights` has another shape or is no floating tensor, or the
                optimizer was not made from `model.named_parameters()`. Nothing has changed then.
        """
        if weights is None:
            take_weights(self._masters, exact=exact)
            return
        named = self._named_with_master(weights)
        overwrite(self._masters, named, self._module)

    def _named_with_master(self, weights: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Returns (parameter, value) for each master that `weights` names."""
        pairs = []
        for group in self.param_groups:
            if "param_names" not in group:
                raise ArgumentError(
                    "sync_masters_from_model: expected an optimizer made from "
                    "model.named_parameters(), got one without names."
                )
            for name, param in zip(group["param_names"], group["params"], strict=True):
                value = weights.get(name)
                if value is None or self._masters.of(param) is param:
                    continue
                if value.shape != param.shape or not value.is_floating_point():
                    raise ArgumentError(
                        f"weights[{name!r}]: expected a floating tensor of shape "
                        f"{list(param.shape)}, got {list(value.shape)} in {value.dtype}."
                    )
                pairs.append((param, value))
        return pairs

    @outside_graphs
    def check_masters(self) -> list[str]:
        """Returns the names of weights that are not their rounded masters; syncs with the host."""
        return [self._name_of(param) for param in stale_weights(self._masters)]

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in self._kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._masters.after_copy()
        self._choose_backend(self._backend_asked)
