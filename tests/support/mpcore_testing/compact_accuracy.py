"""What compact masters and moments cost in accuracy:

    PYTHONPATH=tests/support python -m mpcore_testing.compact_accuracy [--steps 3000] [--seeds 5]

trains the demo's GPT and its digits in each way to keep a state and prints the tables of
docs/memory.md. Two ways round to nearest what the others round at random, or keep: they have to
come out as worse where the loss can tell.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from mpcore.comparison.statistics import agreement
from mpcore.demo.data import draw_offsets, load_corpus, spread_offsets, windows_at
from mpcore.demo.digits import DigitsSettings, Images, SideBySideMLP, summed_loss
from mpcore.demo.model import GPT, language_loss
from mpcore.demo.regimes import (
    BF16_MASTERS,
    BF16_NONE_BF16,
    BF16_NONE_INT8,
    BF16_ROUNDED,
    BF16_SPLIT,
    BF16_SPLIT_BF16,
    BF16_SPLIT_INT8,
    FP32,
    Regime,
    prepare,
)
from mpcore.demo.train import GPTSettings
from mpcore.precision import emulate_tensor_cores

NEAREST = replace(BF16_MASTERS, key="nearest", label="BF16 + masters, moments rounded to nearest")
WAYS = (
    *(FP32, BF16_SPLIT, BF16_SPLIT_BF16, BF16_SPLIT_INT8, BF16_NONE_BF16, BF16_NONE_INT8),
    *(NEAREST, BF16_ROUNDED),
)
#: A small learning rate, and a second moment that moves by a thousandth a step: rounded to nearest
#: in bfloat16 it stands still.
TEXT = GPTSettings(lr=3e-4, betas=(0.9, 0.999), warmup=50)


class Task(NamedTuple):
    """One training."""

    kind: str
    way: int
    seed: int
    steps: int


def round_moments(engine: Any) -> None:
    """Rounds moments to the nearest bfloat16 number, as torch's own optimizers keep them there."""
    for state in engine.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name].copy_(state[name].bfloat16().float())


def _stepping(regime: Regime, engine: Any) -> Callable[[torch.Tensor], None]:
    def step(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()
        engine.zero_grad()
        if regime is NEAREST:
            round_moments(engine)

    return step


def train_text(regime: Regime, seed: int, steps: int) -> float:
    """Returns the validation loss of the demo's GPT."""
    settings = replace(TEXT, steps=steps)
    corpus, context = load_corpus(), settings.config.context
    model, engine = prepare(
        GPT(settings.config, seed), regime, settings.adamw, settings.scale, seed=seed
    )
    step = _stepping(regime, engine)
    offsets = draw_offsets(len(corpus.train), steps, settings.batch, context, seed)
    with emulate_tensor_cores():
        for number in range(steps):
            for group in engine.param_groups:
                group["lr"] = settings.lr_at(number)
            inputs, targets = windows_at(corpus.train, offsets[number], context)
            step(language_loss(model(inputs), targets) * settings.loss_weight)
        chosen = spread_offsets(len(corpus.validation), settings.validation_windows, context)
        with torch.no_grad():
            inputs, targets = windows_at(corpus.validation, chosen, context)
            return float(language_loss(model(inputs), targets))


def train_digits(regime: Regime, seed: int, steps: int) -> float:
    """Returns the loss of one of the demo's networks on images that it has not seen."""
    settings = DigitsSettings(seeds=(seed,), epochs=steps)
    images = Images.load()
    network = SideBySideMLP((64, *settings.hidden, 10), settings.seeds)
    model, engine = prepare(network, regime, settings.adamw, settings.scale, seed=seed)
    step = _stepping(regime, engine)
    with emulate_tensor_cores():
        for batches in images.epochs(settings):
            for inputs, labels in batches:
                step(summed_loss(model(inputs), labels))
        with torch.no_grad():
            logits = images.test_logits(model, 1)[0].float()
            return float(torch.nn.functional.cross_entropy(logits, images.test_labels))


TRAIN = {"text": train_text, "digits": train_digits}


def run(task: Task) -> float:
    torch.set_num_threads(1)
    return TRAIN[task.kind](WAYS[task.way], task.seed, task.steps)


def table(kind: str, found: dict[Task, float], seeds: int) -> str:
    """Returns the table of one kind, in Markdown."""
    lines = ["| Kept as | Loss | vs FP32 | 95 % | verdict |", "|---|---|---|---|---|"]
    of_way = [
        [found[task] for task in sorted(found) if task.kind == kind and task.way == way]
        for way in range(len(WAYS))
    ]
    for regime, losses in zip(WAYS, of_way, strict=True):
        mean = sum(of_way[0]) / seeds
        said = agreement(losses, of_way[0], higher_is_better=False, margin=0.01)
        low, high = said.interval or (said.difference, said.difference)
        shares = [f"{100 * value / mean:+.2f} %" for value in (said.difference, low, high)]
        cells = ("", "", "") if regime is FP32 else (shares[0], " to ".join(shares[1:]), said.name)
        shown = (regime.label, f"{sum(losses) / seeds:.4f}", *cells)
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3000, help="of the GPT")
    parser.add_argument("--epochs", type=int, default=30, help="of the digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    lengths = {"digits": asked.epochs, "text": asked.steps}
    tasks = [
        Task(kind, way, seed, steps)
        for kind, steps in lengths.items()
        for seed in range(asked.seeds)
        for way in range(len(WAYS))
    ]
    found: dict[Task, float] = {}
    with ProcessPoolExecutor(asked.processes) as pool:
        waiting = {pool.submit(run, task): task for task in tasks}
        for done in as_completed(waiting):
            task = waiting[done]
            found[task] = done.result()
            label = WAYS[task.way].label
            print(
                f"{len(found)}/{len(tasks)} {task.kind}, {label}, seed {task.seed}: "
                f"{found[task]:.5f}",
                file=sys.stderr,
                flush=True,
            )
    for kind, length in lengths.items():
        print(
            f"\n{kind}, {length} {'steps' if kind == 'text' else 'epochs'}, {asked.seeds} seeds\n"
        )
        print(table(kind, found, asked.seeds))


if __name__ == "__main__":
    main()
