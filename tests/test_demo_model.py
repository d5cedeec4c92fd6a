"""The demo's GPT."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mpcore.demo.model import GPT, GPTConfig, language_loss

CONFIG = GPTConfig(vocabulary=128, context=16, width=32, heads=4, layers=2)


@pytest.mark.parametrize("position", [1, 8, 15])
def test_model_logits_ignore_future_tokens(position):
    model = GPT(CONFIG, seed=0)
    tokens = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % 128
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    different = (before != after).any(dim=2)
    assert different[:, position:].all()


def test_model_initial_weights_follow_from_the_seed_alone():
    first, again, other = GPT(CONFIG, seed=0), GPT(CONFIG, seed=0), GPT(CONFIG, seed=1)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_model_starts_near_the_loss_of_a_uniform_guess():
    tokens = torch.arange(128).reshape(8, 16)
    loss = language_loss(GPT(CONFIG, seed=0)(tokens), tokens.flip(0))
    # logits of unit variance cost about half a nat over log(128)
    assert abs(loss.item() - np.log(128)) < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_language_loss_is_computed_wider_than_its_logits(dtype):
    logits = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(15).reshape(3, 5)
    wide = logits.double().numpy().reshape(15, 128)
    shifted = wide - wide.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    expected = -log_probabilities[np.arange(15), np.arange(15)].mean()
    loss = language_loss(logits, targets)
    assert loss.dtype == torch.float32
    # float32 sums of 128 and of 15 terms; a 16-bit result would be off by more than 1e-3
    assert abs(loss.item() - expected) < 2e-6
