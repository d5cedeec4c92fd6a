"""Loss scales beside each other on handwritten digits: `python -m mpcore.demo.schedules`.

For each scale: values of float16 gradients that became subnormal, where digits are lost; steps
skipped; test accuracy and loss. Twice: as it is, and with a loss 256 times too large in every
97th step. The model and the data are those of the demo's second experiment.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpcore.demo.digits import DigitsSettings, Images, SideBySideMLP, summed_loss
from mpcore.demo.measure import SubnormalTally
from mpcore.demo.regimes import FP16_MASTERS, prepare
from mpcore.loss_scale import DynamicLossScale, HeadroomLossScale, LossScale, StaticLossScale
from mpcore.precision import emulate_tensor_cores

SCHEDULES: dict[str, LossScale] = {
    "StaticLossScale(1)": StaticLossScale(1.0),
    "DynamicLossScale()": DynamicLossScale(),
    "DynamicLossScale.megatron()": DynamicLossScale.megatron(),
    "HeadroomLossScale()": HeadroomLossScale(),
}
SPIKE, EVERY = 256.0, 97


@dataclass(frozen=True)
class ScheduleRun:
    """What one loss scale did.

    Attributes:
        subnormal: Share of gradient values, not 0, below float16's smallest normal number.
        skipped: Steps skipped.
        steps: Steps in all.
        accuracy: On the test images, mean over the seeds.
        loss: Likewise.
    """

    subnormal: float
    skipped: int
    steps: int
    accuracy: float
    loss: float


def run_schedule(
    scale: LossScale, *, weight: float, spikes: bool, settings: DigitsSettings
) -> ScheduleRun:
    """Trains the digits in float16 with masters; on the CPU.

    Args:
        scale: How the loss is scaled.
        weight: What the loss is multiplied by besides: 1e-3 makes gradients small.
        spikes: Whether every 97th loss is 256 times too large.
        settings: Seeds, epochs, layers, optimizer.

    Example:
        >>> settings = DigitsSettings(epochs=1, seeds=(0,))
        >>> run = run_schedule(StaticLossScale(1.0), weight=1e-3, spikes=False, settings=settings)
        >>> run.steps, run.skipped, run.subnormal > 0.5
        (45, 0, True)
    """
    images = Images.load()
    model, engine = prepare(
        SideBySideMLP((64, *settings.hidden, 10), settings.seeds),
        FP16_MASTERS,
        settings.adamw,
        scale,
    )
    tally, steps = SubnormalTally(), 0
    for batches in images.epochs(settings):
        for inputs, labels in batches:
            factor = weight * (SPIKE if spikes and steps % EVERY == EVERY - 1 else 1.0)
            with emulate_tensor_cores():
                engine.backward(summed_loss(model(inputs), labels) * factor)
            tally.count(model.parameters())
            engine.step()
            engine.zero_grad()
            steps += 1
    seeds = len(settings.seeds)
    logits = images.test_logits(model, seeds)
    hits = (logits.argmax(dim=2) == images.test_labels).float().mean()
    loss = summed_loss(logits, images.test_labels.expand(seeds, -1)) / seeds
    return ScheduleRun(tally.fraction or 0.0, engine.skipped_steps, steps, float(hits), float(loss))


def main(settings: DigitsSettings) -> None:
    """Prints the table."""
    print("| spikes | loss x | scale | subnormal | skipped | test accuracy | test loss |")
    print("|---|---|---|---|---|---|---|")
    for spikes in (False, True):
        for weight in (1.0, 1e-3):
            for name, scale in SCHEDULES.items():
                run = run_schedule(scale, weight=weight, spikes=spikes, settings=settings)
                print(
                    f"| {'yes' if spikes else 'no'} | {weight:g} | `{name}` | {run.subnormal:.2%} "
                    f"| {run.skipped} of {run.steps} | {run.accuracy:.1%} | {run.loss:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main(DigitsSettings(epochs=20))
