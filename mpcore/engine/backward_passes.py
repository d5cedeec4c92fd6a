"""The part of `mpcore.MixedPrecisionOptimizer` before the step: scaling, and adding gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor

from mpcore.base import outside_graphs
from mpcore.engine.passes import Passes
from mpcore.engine.stage import Stage
from mpcore.loss_scale import (
    Losses,
    LossScale,
    LossScaleTensors,
    ScaledLoss,
    check_loss_scale,
    scale_outputs,
)
from mpcore.masters import Masters

Outputs = TypeVar("Outputs")


class BackwardPasses:
    """The methods of an optimizer that come before its step."""

    loss_scaling: LossScale
    _scale: LossScaleTensors
    _losses: Losses
    _stage: Stage
    _masters: Masters
    state: defaultdict[Tensor, Any]
    param_groups: list[dict[str, Any]]

    @outside_graphs
    def scale(self, outputs: Outputs) -> Outputs:
        """Returns `outputs` multiplied by the loss scale in float32, without a host sync.

        Args:
            outputs: A tensor, or a list or tuple of outputs. float16 and bfloat16 become
                float32 (a scale of 2^16 is infinite in float16); float64 stays. With
                `NoLossScale` tensors are returned as they are.

        Raises:
            ArgumentTypeError: Something else.
            StageError: Gradients of this step are already unscaled; more would get lost.
        """
        stage = self._stage
        stage.begin_pass("scale()")
        if stage.watcher is not None:
            stage.watcher.see_loss(outputs)
        if not self.loss_scaling.scales:
            stage.passes = Passes.begun()
            stage.flush_watch.see_loss(outputs)
            return outputs
        scaled: Outputs = scale_outputs(outputs, self._scale.scale)
        stage.note_scaled(scaled)
        return scaled

    @outside_graphs
    def backward(
        self,
        loss: Tensor,
        *,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Sequence[Tensor] | None = None,
    ) -> None:
        """Runs `scale(loss).backward(...)`, without a host sync.

        Args:
            loss: 0-d, any floating dtype.
            retain_graph: As in `Tensor.backward`, like the two others.
            create_graph: See there.
            inputs: See there.
        """
        self.scale(loss).backward(  # type: ignore[no-untyped-call]
            retain_graph=retain_graph, create_graph=create_graph, inputs=inputs
        )

    @outside_graphs
    def accumulate(self) -> None:
        """Adds the unscaled gradients to float32 sums and drops `p.grad`; no host sync.

        Call it after each backward pass of a step. `step` takes the sums, which lose nothing that
        16-bit sums of many micro-batches would. They take 4 bytes for each parameter.

        Raises:
            StageError: The gradients were never scaled, or this step's are unscaled already.
        """
        self._stage.ranks.check_not_joined("accumulate()")
        self._masters.take_over_edits(self.state, self.param_groups)
        self._stage.accumulate("accumulate()")

    @property
    def losses(self) -> Mapping[str, ScaledLoss]:
        """What `add_loss` made, by name."""
        return MappingProxyType(self._losses.each)

    @outside_graphs
    def add_loss(self, name: str, loss_scale: LossScale) -> ScaledLoss:
        """Returns a loss with a scale of its own, for adversarial or multi-task training.

        Its gradients are unscaled and added to those of other losses in float32.

        Args:
            name: For checkpoints and reports; not empty, and each once.
            loss_scale: How its scale moves.

        Raises:
            ArgumentTypeError: `loss_scale` is something else.
            ArgumentError: The name is empty or taken, or there are ranks to agree with.

        Example:
            >>> import torch, mpcore
            >>> weight = torch.nn.Parameter(torch.ones(2).half())
            >>> optimizer = mpcore.MixedPrecisionOptimizer(
            ...     torch.optim.SGD([weight], lr=1.0),
            ...     mpcore.StaticLossScale(2.0**10),
            ... )
            >>> penalty = optimizer.add_loss("penalty", mpcore.StaticLossScale(2.0**4))
            >>> optimizer.backward(weight.float().sum())
            >>> penalty.backward(weight.float().square().sum())
            >>> optimizer.step()
            >>> weight.tolist()
            [-2.0, -2.0]
        """
        self._stage.ranks.check_losses()
        return self._losses.add(self, name, check_loss_scale(loss_scale), self._scale)
