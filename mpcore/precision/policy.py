"""Precision policies: which types a model's weights, its arithmetic and its results have.

    name             parameters  compute   masters  loss scale
    float32          FP32        FP32      none     none
    mixed_float16    FP32        FP16 (a)  none     dynamic
    mixed_bfloat16   FP32        BF16 (a)  none     none
    float16          FP16        FP16      FP32     dynamic
    bfloat16         BF16        BF16      FP32     none

(a) by `torch.autocast`, operation by operation. Results are cast to FP32 under every policy, and
normalisation layers have FP32 parameters.

Sources: the names are those of Keras (`keras.mixed_precision`); parameters, compute and output as
three types are those of JMP (`jmp.Policy`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from mpcore.engine import MixedPrecisionOptimizer
from mpcore.errors import ArgumentError, ArgumentTypeError, StageError
from mpcore.loss_scale import DynamicLossScale, LossScale, NoLossScale
from mpcore.precision.autocast import AutocastScope
from mpcore.precision.cast_model import cast_model, check_model, check_optimizer
from mpcore.precision.casts import CastInputs, CastOutputs, attach
from mpcore.precision.islands import outermost

Model = TypeVar("Model", bound=nn.Module)


class _Types(NamedTuple):
    param: torch.dtype
    compute: torch.dtype


_TYPES: Mapping[str, _Types] = {
    "float32": _Types(torch.float32, torch.float32),
    "mixed_float16": _Types(torch.float32, torch.float16),
    "mixed_bfloat16": _Types(torch.float32, torch.bfloat16),
    "float16": _Types(torch.float16, torch.float16),
    "bfloat16": _Types(torch.bfloat16, torch.bfloat16),
}


@dataclass(frozen=True)
class Policy:
    """The types of a model's parameters, arithmetic and results, as one immutable value.

    Args:
        name: "float32", "mixed_float16", "mixed_bfloat16", "float16" or "bfloat16".
        output_dtype: The floating type of what the model returns. FP32, so that the loss is
            computed in FP32; with the compute type results are left as they come.

    Attributes:
        param_dtype: The type of the parameters, normalisation layers aside, which have FP32 ones.
        compute_dtype: The type that matrix products and convolutions read.

    Raises:
        ArgumentTypeError: `name` or `output_dtype` is of another type.
        ArgumentError: No policy has that name, or `output_dtype` is not a floating type.

    Example:
        >>> import mpcore
        >>> policy = mpcore.Policy("mixed_float16")
        >>> policy.param_dtype, policy.compute_dtype, policy.output_dtype
        (torch.float32, torch.float16, torch.float32)
        >>> mpcore.Policy("bfloat16").master_dtype
        torch.float32
    """

    name: str
    output_dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype = field(init=False, repr=False)
    compute_dtype: torch.dtype = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ArgumentTypeError(f"name: expected a string, got {type(self.name).__name__}.")
        if self.name not in _TYPES:
            raise ArgumentError(f"name: expected one of {', '.join(_TYPES)}, got {self.name!r}.")
        if not isinstance(self.output_dtype, torch.dtype):
            raise ArgumentTypeError(
                f"output_dtype: expected a torch.dtype, got {type(self.output_dtype).__name__}."
            )
        if self.output_dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ArgumentError(
                "output_dtype: expected torch.float32, torch.float16 or torch.bfloat16, got "
                f"{self.output_dtype}."
            )
        object.__setattr__(self, "param_dtype", _TYPES[self.name].param)
        object.__setattr__(self, "compute_dtype", _TYPES[self.name].compute)

    @property
    def master_dtype(self) -> torch.dtype | None:
        """The type of the optimizer's copy of 16-bit parameters; None where none is needed."""
        return None if self.param_dtype == torch.float32 else torch.float32

    def loss_scale(self) -> LossScale:
        """Returns the loss scale that suits the compute type: dynamic for FP16, else none; no sync.

        FP16 gradients below 2^-24 vanish; BF16 has the exponents of FP32 and loses none.

        Example:
            >>> import mpcore
            >>> mpcore.Policy("float16").loss_scale() == mpcore.DynamicLossScale()
            True
        """
        return DynamicLossScale() if self.compute_dtype == torch.float16 else NoLossScale()

    def autocast(self, device_type: str) -> torch.autocast:
        """Returns a context in which FP32 parameters are computed with in the compute type.

        It is `torch.autocast(device_type, compute_dtype)` for the mixed policies. The others
        compute in the type of their parameters, and this turns autocast off for them.

        Args:
            device_type: "cuda", "cpu" or another that `torch.autocast` knows.

        Example:
            >>> import torch, mpcore
            >>> a = torch.ones(2, 2)
            >>> with mpcore.Policy("mixed_bfloat16").autocast("cpu"):
            ...     (a @ a).dtype
            torch.bfloat16
        """
        if self._is_mixed:
            return torch.autocast(device_type, self.compute_dtype)
        return torch.autocast(device_type, enabled=False)

    def apply(
        self,
        model: Model,
        optimizer: MixedPrecisionOptimizer | None = None,
        *,
        overrides: Mapping[str, str] | None = None,
    ) -> Model:
        """Makes a model compute under this policy, in place; the 16-bit policies sync.

        "float16" and "bfloat16" cast it by `cast_model`. The mixed policies leave its parameters
        alone and run its forward pass under `autocast`; no `with` is needed around it. Results are
        cast to `output_dtype`. Applying the same policy again changes nothing.

        Args:
            model: Any module.
            optimizer: Takes the FP32 originals of 16-bit parameters as masters. FP32 parameters
                need none, and the other policies do not touch it.
            overrides: `{name: "float32"}`: modules, by name as in `cast_model`, that stay in FP32
                with all that is inside them: `{"lm_head": "float32"}`. For another policy in a
                part of a model, apply it to that part.

        Returns:
            `model` itself.

        Raises:
            ArgumentTypeError: An argument has the wrong type.
            ArgumentError: An override names nothing or says something other than "float32"; and
                what `cast_model` raises.
            StageError: Another policy was applied to the model before; and as `cast_model`.

        Example:
            >>> import torch, mpcore
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
            >>> model = mpcore.Policy("bfloat16").apply(model, overrides={"1": "float32"})
            >>> model[0].weight.dtype, model[1].weight.dtype
            (torch.bfloat16, torch.float32)
        """
        kept = _check_arguments(model, optimizer, overrides)
        record = _AppliedPolicy(self, tuple(kept))
        is_new = _check_applied(model, record)
        if self._is_mixed:
            # names are looked up before anything is attached
            self._attach_autocast(model, outermost(model, kept))
        elif self.param_dtype != torch.float32:
            cast_model(model, self.param_dtype, optimizer, keep_fp32=kept)
        else:
            outermost(model, kept)
        if is_new:
            model.register_forward_hook(record)
        return model

    @property
    def _is_mixed(self) -> bool:
        return self.param_dtype != self.compute_dtype

    def _attach_autocast(self, model: nn.Module, kept: list[nn.Module]) -> None:
        AutocastScope(self.compute_dtype).attach(model)
        for module in kept:
            AutocastScope(torch.float32).attach(module)
            attach(module, (CastInputs(torch.float32), None))


@dataclass(frozen=True)
class _AppliedPolicy:
    """The forward hook of a model that a policy was applied to: finishes the model's results."""

    policy: Policy
    kept: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> object:
        if self.policy.output_dtype == self.policy.compute_dtype:
            return output
        return CastOutputs(self.policy.output_dtype)(module, args, output)


def _check_arguments(model: object, optimizer: object, overrides: object) -> list[str]:
    """Returns the names of the modules to keep in FP32."""
    check_model(model)
    check_optimizer(optimizer)
    if overrides is None:
        return []
    if not isinstance(overrides, Mapping):
        raise ArgumentTypeError(
            f'overrides: expected a mapping {{name: "float32"}}, got {type(overrides).__name__}.'
        )
    for name, override in overrides.items():
        if override != "float32":
            raise ArgumentError(
                f'overrides: expected "float32" for {name!r}, got {override!r}. For another '
                "policy in a part of the model, apply it to that part."
            )
    return sorted(overrides)


def _check_applied(model: nn.Module, record: _AppliedPolicy) -> bool:
    """Tells whether no policy was applied to `model` yet; raises if it was another one."""
    for hook in model._forward_hooks.values():
        if isinstance(hook, _AppliedPolicy) and hook != record:
            raise StageError(
                f"model: expected one without a policy, or with this one, got {hook.policy} with "
                f"overrides for {list(hook.kept)}. Build the model anew and apply one policy."
            )
    return record not in model._forward_hooks.values()
