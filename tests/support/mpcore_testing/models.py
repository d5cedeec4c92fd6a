"""Small models that are cast, and what tests compare of them."""

from __future__ import annotations

from typing import Any

import mpcore
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A pre-norm Transformer block with causal attention."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Embeddings, a position parameter that the model uses itself, blocks, final norm, head."""

    def __init__(self, *, tied: bool = False, blocks: int = 2) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 16)
        self.wpe = nn.Parameter(0.02 * torch.randn(8, 16))
        self.blocks = nn.ModuleList(Block(16) for _ in range(blocks))
        self.ln_f = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 11, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))  # type: ignore[no-any-return]


class Spy(nn.Module):
    """Hands its input through and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.got: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.got = args, kwargs
        return args[0] if args else None


def gpt(**options: Any) -> GPT:
    """A GPT with the same weights on every call."""
    torch.manual_seed(0)
    return GPT(**options)


def tokens() -> torch.Tensor:
    """A batch for it, [2, 8]."""
    return torch.arange(16).view(2, 8) % 11


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything in the model's state."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    """Whether names, types and bits are those of the snapshot."""
    after = model.state_dict()
    return list(after) == list(before) and all(
        after[k].dtype == v.dtype and torch.equal(after[k], v) for k, v in before.items()
    )


def hook_count(model: nn.Module) -> int:
    """How many forward hooks and pre-hooks the model carries in all."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def wrapped(model: nn.Module) -> mpcore.MixedPrecisionOptimizer:
    """An AdamW over the model, wrapped."""
    return mpcore.MixedPrecisionOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
