"""The golden cases: what is trained, with which optimizer, under which loss scale, and how."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mpcore
import torch
from torch import Tensor

from mpcore_testing.golden import loops, plans

if TYPE_CHECKING:
    from mpcore_testing.golden.training import Training

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
MIXTURES = {
    "float16": (HALF,) * 4,
    "bfloat16": (BRAIN,) * 4,
    "mixed": (HALF, FULL, BRAIN, FULL),
}
#: A vector and a remainder for every width, a matrix, a scalar.
SHAPES = ((17,), (2, 2), (), (3,))
#: Enough that the compiled backend wakes other threads, and not a multiple of anything.
LONG = ((140_003,), (7,), (), (1025,))
BACKENDS = ("reference", "compiled", "triton")
SCALE = mpcore.DynamicLossScale(init=2.0**10, growth_interval=2)


@dataclass(frozen=True)
class Rule:
    """An optimizer with options, and those that its second param group has of its own."""

    kind: type[torch.optim.Optimizer]
    options: dict[str, Any]
    second: dict[str, Any]

    def build(self, params: list[Any], **more: Any) -> torch.optim.Optimizer:
        """Returns the optimizer of two param groups."""
        half = len(params) // 2
        groups = [{"params": params[:half]}, {"params": params[half:], **self.second}]
        # an option may be a tensor, which a schedule writes to
        return self.kind(groups, **{**copy.deepcopy(self.options), **more})


ADAMW = Rule(torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.003, "eps": 1e-6})
SGD = Rule(torch.optim.SGD, {"lr": 0.01}, {"lr": 0.1, "weight_decay": 0.1})
RULES = {
    "AdamW": ADAMW,
    "AdamW amsgrad": Rule(
        torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "eps": 1e-4}, {"betas": (0.8, 0.95)}
    ),
    "Adam L2": Rule(
        torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.05}, {"betas": (0.8, 0.95), "eps": 1e-6}
    ),
    "Adam amsgrad maximize": Rule(
        torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "maximize": True}, {"weight_decay": 0.1}
    ),
    "SGD": SGD,
    "SGD momentum": Rule(
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01},
        {"momentum": 0.5},
    ),
    "SGD nesterov maximize": Rule(
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "maximize": True},
        {"lr": 0.1, "weight_decay": 0.1},
    ),
    "Adagrad": Rule(
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.25},
        {"weight_decay": 0.01, "eps": 1e-6},
    ),
    "Lion": Rule(mpcore.optim.Lion, {"lr": 0.01}, {"betas": (0.8, 0.95)}),
    "Lion decay maximize": Rule(
        mpcore.optim.Lion, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}, {"lr": 0.003}
    ),
}
#: For torch's own step: products are exact, so that it may fuse them into a multiply-add or not.
EXACT_SGD = Rule(torch.optim.SGD, {"lr": 0.0625, "momentum": 0.5}, {"lr": 0.25})


@dataclass(frozen=True)
class Case:
    """One golden run.

    Attributes:
        name: What it is recorded under.
        rule: The optimizer.
        dtypes: Of the parameters, whose shapes are `shapes`.
        scale: The loss scale.
        plan: What happens in each step.
        loop: Makes one step of the plan; returns the norm if it clipped.
        begin: Adds to a training what the loop needs.
        backends: Those that have its bits.
        shapes: Of the parameters.
        resumes: Whether it can be saved and loaded between its steps.
    """

    name: str
    rule: Rule = ADAMW
    dtypes: tuple[torch.dtype, ...] = MIXTURES["mixed"]
    scale: Any = SCALE
    plan: tuple[plans.Step, ...] = plans.EVERYTHING
    loop: Callable[[Training, plans.Step], Tensor | None] = loops.usual
    begin: Callable[[Training], None] = loops.nothing_more
    backends: tuple[str, ...] = BACKENDS
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    resumes: bool = True

    @property
    def keeps_values(self) -> bool:
        """Whether its values are recorded beside their hashes."""
        return self.shapes == SHAPES


def _rules() -> list[Case]:
    return [
        Case(f"{name}, {mixture}", rule, dtypes)
        for name, rule in RULES.items()
        for mixture, dtypes in MIXTURES.items()
    ]


def _rounded_norms() -> list[Case]:
    """The compiled backend has an order of its own for the norm; documented as such."""
    return [
        Case(
            f"rounded norms, {mixture}, {' and '.join(backends)}",
            dtypes=dtypes,
            plan=plans.ROUNDED_NORMS,
            backends=backends,
        )
        for mixture, dtypes in MIXTURES.items()
        for backends in (("reference", "triton"), ("compiled",))
    ]


def _scales() -> list[Case]:
    dynamic = mpcore.DynamicLossScale
    skips = {"dtypes": MIXTURES["float16"], "plan": plans.SKIPS, "rule": RULES["SGD momentum"]}
    return [
        Case("static scale", scale=mpcore.StaticLossScale(2.0**7)),
        Case("no scale, bfloat16", dtypes=MIXTURES["bfloat16"], scale=mpcore.NoLossScale()),
        Case(
            "headroom",
            scale=mpcore.HeadroomLossScale(init=2.0**12, spare_bits=2, window=4),
            plan=plans.SWELLING,
        ),
        Case("hysteresis", scale=dynamic(init=2.0**10, growth_interval=3, hysteresis=2), **skips),
        Case(
            "hysteresis, clean refills",
            scale=dynamic(init=2.0**10, hysteresis=2, refill="clean"),
            **skips,
        ),
        Case("tolerance", scale=dynamic(init=2.0**10, tolerance=0.6), **skips),
        Case("scale at its minimum", scale=dynamic(init=2.0, min_scale=1.0), **skips),
    ]


def _loops() -> list[Case]:
    half, exact = MIXTURES["float16"], (FULL,) * 4
    return [
        Case("several losses", loop=loops.several_losses, begin=loops.add_losses),
        Case("unscaled before the clip", loop=loops.unscaled_first),
        Case("closure", loop=loops.with_closure),
        Case("learning rate in a tensor", Rule(torch.optim.AdamW, {"lr": torch.tensor(0.01)}, {})),
        Case("saturated", Rule(torch.optim.SGD, {"lr": 2.0**16}, {}), half),
        *(
            Case(
                f"{name} around it",
                RULES["SGD momentum"],
                loop=loops.driven_by_scaler,
                begin=begin,
                resumes=False,
            )
            for name, begin in (
                ("torch.amp.GradScaler", loops.add_torch_scaler),
                ("mpcore.GradScaler", loops.add_own_scaler),
            )
        ),
        Case(
            "mpcore.GradScaler without a wrapper",
            EXACT_SGD,
            exact,
            loop=loops.driven_by_scaler,
            begin=loops.add_own_scaler,
            backends=("none",),
            resumes=False,
        ),
    ]


def _long() -> list[Case]:
    plan = (plans.Step((plans.Pass(bad=plans.INF),)), plans.CLEAN, plans.CLIPPED)
    rounded = plans.ROUNDED_NORMS[:2]
    options: dict[str, Any] = {"shapes": LONG, "resumes": False}
    return [
        Case("long tensors", plan=plan, backends=("reference", "compiled"), **options),
        Case("long tensors, rounded norms", plan=rounded, backends=("compiled",), **options),
    ]


CASES = {c.name: c for c in (*_rules(), *_rounded_norms(), *_scales(), *_loops(), *_long())}
