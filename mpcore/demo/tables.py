"""Results as tables of text: one source for the terminal and for the HTML report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpcore.base import Table
from mpcore.demo.digits import DigitsRun
from mpcore.demo.experiment import DemoResult, mean, relative_to_fp32
from mpcore.demo.regimes import FP32, GPT_REGIMES, Regime


def gpt_table(result: DemoResult) -> Table:
    """Returns the table of the GPT runs."""
    gpt = result.settings.gpt
    config = gpt.config
    run = result.runs[0]
    return Table(
        title=f"A small GPT on Python source: {gpt.steps} steps, {seeds_text(result)}",
        header=(
            "Regime",
            "Loss",
            "vs FP32",
            "Skips",
            "Final scale",
            "Tiny grads",
            "Updates lost",
            "Bytes per param",
        ),
        rows=tuple(_gpt_row(result, regime) for regime in GPT_REGIMES),
        notes=(
            f"{run.parameters:,} parameters ({config.layers} blocks, width {config.width}, "
            f"context {config.context}), {gpt.batch} windows per step, AdamW with a peak learning "
            f"rate of {small(gpt.lr)}. Same initial weights, batches and learning rates "
            f"everywhere. Loss in nats per character on {len(result.corpus.validation_files)} "
            f"files that are never trained on, computed in each regime's own arithmetic.",
            f"In every regime the loss is multiplied by {power_of_two(gpt.loss_weight)} before "
            f"anything else, and AdamW's eps of {small(gpt.eps)} by the same, so in exact "
            f"arithmetic the weight changes nothing (in FP32 not one bit). It makes gradients as "
            f"small as a mean over {round(1 / gpt.loss_weight):,} times more characters would.",
            f"Scaled regimes start at {power_of_two(gpt.scale.init)}, which is too high on "
            f"purpose, and double after {gpt.scale.growth_interval} clean steps; the one with "
            f"headroom computes its scale from the largest gradients instead. Unscaled ones use 1. "
            f"Tiny grads: share of the 16-bit gradient values that are subnormal, so small that "
            f"they lost digits; those that became 0 are not among them.",
            "Without masters, moments and update are FP32 all the same; only the result is "
            "rounded to 16 bits. Layer norms keep FP32 parameters in every regime.",
            "Updates lost: share of the non-zero updates that left the stored value (the master, "
            "where there is one) as it was. Bytes per param: weights, gradients, masters and "
            "moments that stay in memory, measured; with masters the optimizer's general path "
            "also uses an FP32 gradient while it steps.",
        ),
    )


def _gpt_row(result: DemoResult, regime: Regime) -> tuple[str, ...]:
    runs = result.of(regime)
    shares = [run.subnormal for run in runs if run.subnormal is not None]
    return (
        regime.label,
        over_seeds([run.validation_loss for run in runs], "{:.4f}"),
        "" if regime == FP32 else percent(relative_to_fp32(result, regime)),
        over_seeds([len(run.skipped) for run in runs], "{:g}"),
        " ".join(sorted({power_of_two(run.final_scale) for run in runs})),
        f"{mean(shares):.1%}" if shares else "",
        f"{mean([run.lost_updates for run in runs]):.1%}",
        f"{runs[0].resident.per_parameter:.1f}",
    )


def bytes_table(result: DemoResult) -> Table:
    """Returns the table of resident bytes per parameter, by what they hold."""
    rows = []
    for regime in GPT_REGIMES:
        resident = result.of(regime)[0].resident
        parts = (resident.weights, resident.gradients, resident.masters, resident.moments)
        rows.append(
            (
                regime.label,
                *(f"{part / resident.parameters:.2f}" for part in (*parts, resident.total)),
            )
        )
    return Table(
        title="Bytes per parameter that stay in memory",
        header=("Regime", "Weights", "Gradients", "Masters", "Moments", "Total"),
        rows=tuple(rows),
        notes=("Measured from the sizes of the tensors between backward and zero_grad.",),
    )


def digits_table(result: DemoResult) -> Table:
    """Returns the table of the digits runs."""
    digits = result.settings.digits
    sizes = "-".join(map(str, (64, *digits.hidden, 10)))
    return Table(
        title=f"Handwritten digits at a small learning rate: {digits.epochs} epochs, "
        f"{len(digits.seeds)} seeds",
        header=("Regime", "Test accuracy", "Lowest", "Highest", "Skipped steps", "Updates lost"),
        rows=tuple(_digits_row(run) for run in result.digits),
        notes=(
            f"A {sizes} ReLU network, Adam at a learning rate of {small(digits.adamw.lr)}, "
            f"{digits.batch} of the 1,437 training images per step, 360 to test. Here the "
            f"update is so small against the weight that FP16 alone loses most of them too.",
        ),
    )


def _digits_row(run: DigitsRun) -> tuple[str, ...]:
    return (
        run.regime.label,
        f"{mean(run.accuracies):.1%}",
        f"{min(run.accuracies):.1%}",
        f"{max(run.accuracies):.1%}",
        str(run.skipped_steps),
        f"{run.lost_updates:.1%}",
    )


def seeds_text(result: DemoResult) -> str:
    """Says which seeds ran: "seed 0", or "mean of 3 seeds"."""
    seeds = result.settings.seeds
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of {len(seeds)} seeds (range)"


def over_seeds(values: Sequence[float], form: str) -> str:
    """Formats one value, or the mean of several with their range.

    Example:
        >>> over_seeds([1.0], "{:g}"), over_seeds([1.0, 3.0], "{:g}")
        ('1', '2 (1 to 3)')
    """
    middle = form.format(mean(values))
    if len(values) == 1 or min(values) == max(values):
        return middle
    return f"{middle} ({form.format(min(values))} to {form.format(max(values))})"


def percent(share: float) -> str:
    """Formats a difference in per cent, with its sign.

    Example:
        >>> percent(0.0123), percent(-1e-9)
        ('+1.23%', '+0.00%')
    """
    return f"{round(share, 4) + 0.0:+.2%}"  # adding 0.0 turns -0.0 into 0.0


def small(value: float) -> str:
    """Formats a small number without a leading zero in its exponent.

    Example:
        >>> small(1e-8), small(0.001)
        ('1e-8', '0.001')
    """
    return f"{value:g}".replace("e-0", "e-")


def power_of_two(value: float) -> str:
    """Formats a power of two.

    Example:
        >>> power_of_two(65536.0), power_of_two(1.0)
        ('2^16', '1')
    """
    return "1" if value == 1 else f"2^{math.log2(value):.0f}"
