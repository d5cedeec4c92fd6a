"""Dynamic loss scales that move as those of other systems do, with their documented defaults."""

from __future__ import annotations

from typing import Any, TypeVar

_LOWEST, _HIGHEST = 2.0**-126, 2.0**126  # where a scale and its reciprocal are normal numbers

#: The settings of each system. Where it has no bound, or one that lets the scale reach 0 or
#: infinity, the bound is the last power of two at which scaling is exact. Where its code departs
#: from what it documents, the documentation is followed: docs/loss-scaling.md lists such places.
SETTINGS: dict[str, dict[str, Any]] = {
    "torch": {"init": 2.0**16, "min_scale": _LOWEST, "max_scale": _HIGHEST},
    "keras2": {"init": 2.0**15, "min_scale": 1.0, "max_scale": _HIGHEST},
    "keras3": {"init": 2.0**15, "min_scale": _LOWEST, "max_scale": _HIGHEST},
    "jmp": {"init": 2.0**15, "min_scale": 1.0, "max_scale": _HIGHEST},
    "flax": {"init": 2.0**16, "min_scale": _LOWEST, "max_scale": _HIGHEST},
    "apex": {"init": 2.0**16, "min_scale": _LOWEST, "max_scale": 2.0**24},
    "megatron": {
        "init": 2.0**32,
        "growth_interval": 1000,
        "hysteresis": 2,
        "min_scale": 1.0,
        "max_scale": _HIGHEST,
    },
    "deepspeed": {
        "init": 2.0**16,
        "growth_interval": 1000,
        "hysteresis": 2,
        "min_scale": 1.0,
        "max_scale": _HIGHEST,
    },
    "fairseq": {
        "init": 2.0**7,
        "growth_interval": 2**14,
        "min_scale": 2.0**-13,  # the power of two above its 1e-4
        "max_scale": _HIGHEST,
        "at_min": "raise",
    },
    "paddle": {
        "init": 2.0**16,
        "refill": "clean_or_backoff",
        "min_scale": _LOWEST,
        "max_scale": _HIGHEST,
    },
}


_T = TypeVar("_T", bound="Presets")


class Presets:
    """Ways to make a `DynamicLossScale`, one named after each system."""

    @classmethod
    def _of(cls: type[_T], system: str, **changes: Any) -> _T:
        return cls(**{**SETTINGS[system], **changes})

    @classmethod
    def torch(cls: type[_T]) -> _T:
        """As `torch.amp.GradScaler`: 2^16, doubled after 2,000 clean steps, halved at once."""
        return cls._of("torch")

    @classmethod
    def keras2(cls: type[_T]) -> _T:
        """As `tf.keras.mixed_precision.LossScaleOptimizer`: 2^15, 2,000 steps, never below 1."""
        return cls._of("keras2")

    @classmethod
    def keras3(cls: type[_T]) -> _T:
        """As `keras.optimizers.LossScaleOptimizer`: 2^15, 2,000 steps, no floor at 1."""
        return cls._of("keras3")

    @classmethod
    def jmp(cls: type[_T]) -> _T:
        """As `jmp.DynamicLossScale`: 2^15 as its README has it, 2,000 steps, never below 1."""
        return cls._of("jmp")

    @classmethod
    def flax(cls: type[_T]) -> _T:
        """As `flax.training.dynamic_scale.DynamicScale`: 2^16, 2,000 steps."""
        return cls._of("flax")

    @classmethod
    def apex(cls: type[_T]) -> _T:
        """As `apex.amp`: 2^16, 2,000 steps, never above 2^24."""
        return cls._of("apex")

    @classmethod
    def megatron(cls: type[_T]) -> _T:
        """As Megatron's `DynamicGradScaler`: 2^32, 1,000 steps, hysteresis 2, never below 1."""
        return cls._of("megatron")

    @classmethod
    def deepspeed(cls: type[_T], *, consecutive: bool = False) -> _T:
        """As DeepSpeed's `DynamicLossScaler`: 2^16, 1,000 steps, hysteresis 2, never below 1.

        Args:
            consecutive: Its `consecutive_hysteresis`: a clean step fills the hysteresis up again,
                so that overflows which alternate with clean steps never lower the scale.
        """
        return cls._of("deepspeed", refill="clean" if consecutive else "growth")

    @classmethod
    def fairseq(cls: type[_T], *, tolerance: float = 0.0) -> _T:
        """As fairseq's `DynamicLossScaler` for one worker: 2^7, 2^14 steps; raises at 2^-13.

        Args:
            tolerance: Its `fp16_scale_tolerance`: the share of steps that may overflow.
        """
        return cls._of("fairseq", tolerance=tolerance)

    @classmethod
    def paddle(cls: type[_T], *, decr_every_n: int = 1) -> _T:
        """As `paddle.amp.GradScaler`: 2^16, 2,000 steps, halved after overflows in a row.

        Args:
            decr_every_n: How many in a row; the next one after backing off counts from 1 again.
        """
        return cls._of("paddle", hysteresis=decr_every_n)
