"""An ordinary training loop to compare: `mpcore compare mpcore.demo.digits_loop:train`.

A small network learns the handwritten digits of scikit-learn with Adam; the metric is its accuracy
on images that it has not seen.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import mpcore
from mpcore.demo.digits import Images

EPOCHS, BATCH = 10, 32


def train(run: mpcore.TrainingRun) -> float:
    """Trains once and returns the test accuracy in per cent.

    Args:
        run: From `mpcore.compare`.

    Example:
        >>> result = mpcore.compare(train, ["bfloat16"], seeds=1, higher_is_better=True)
        >>> result.of("float32")[0].metric > 80
        True
    """
    images = Images.load()
    model: nn.Module = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    model, optimizer = run.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-3))
    for _ in range(EPOCHS):
        for chosen in torch.split(torch.randperm(len(images.train)), BATCH):
            loss = F.cross_entropy(model(images.train[chosen]), images.labels[chosen])
            optimizer.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        hits = model(images.test).argmax(dim=1) == images.test_labels
    return 100 * float(hits.float().mean())
