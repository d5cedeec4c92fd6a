"""A small pre-norm GPT: embeddings, causal attention, GELU MLPs.

Reference: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpcore.precision import LayerNorm


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a `GPT`.

    Example:
        >>> GPTConfig(vocabulary=128, context=64, width=64, heads=4, layers=2).width
        64
    """

    vocabulary: int
    context: int
    width: int
    heads: int
    layers: int


class CausalAttention(nn.Module):
    """Multi-head attention in which a position sees itself and the past only."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[batch, time, width]` to the same shape."""
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return out


class Block(nn.Module):
    """One pre-norm Transformer block: attention, then a GELU MLP four times as wide."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.width)
        self.attention = CausalAttention(config)
        self.mlp_norm = LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[batch, time, width]` to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    """A causal language model over characters.

    Example:
        >>> model = GPT(GPTConfig(vocabulary=128, context=16, width=32, heads=2, layers=1), seed=0)
        >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
        torch.Size([2, 16, 128])
    """

    def __init__(self, config: GPTConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self._initialise(seed)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps int64 `[batch, time]` to logits `[batch, time, vocabulary]`."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        # as in GPT-2, the layers that write into the residual stream start smaller, so that the
        # stream's variance does not grow with depth
        into_residual = 1 / math.sqrt(2 * self.config.layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 0.1, generator=generator)
            elif isinstance(module, nn.Linear):
                # 1 / sqrt(fan in) keeps the variance; GPT-2's 0.02 belongs to a width of 768
                std = 1 / math.sqrt(module.in_features)
                if name.endswith(("attention.out", "mlp.2")):
                    std *= into_residual
                module.weight.normal_(0.0, std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()


def language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per character, computed in FP32, without a host sync.

    Args:
        logits: `[batch, time, vocabulary]`, any floating dtype.
        targets: `[batch, time]` int64.

    Example:
        >>> language_loss(torch.zeros(1, 2, 128), torch.zeros(1, 2, dtype=torch.long)).item()
        4.852030277252197
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
