"""Small models of many kinds, each with a batch and a loss; buffers under names of no list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcore_testing.models import GPT, tokens


class Row(NamedTuple):
    """A model, what it is called with, and the loss of its result."""

    model: nn.Module
    batch: dict[str, Any]
    loss: Callable[[Any], Tensor]


def pulled(result: Tensor) -> Tensor:
    """A loss that pulls at every value of a result, each with a weight of its own."""
    weights = torch.linspace(-1, 1, result.numel()).view(result.shape)
    return (result.float() * weights).mean() + result.float().square().mean()


class Rotary(nn.Module):
    """A Llama-like block: rotary attention, RMS norm and tables of its own, SwiGLU."""

    def __init__(self, width: int = 32, heads: int = 2, length: int = 16) -> None:
        super().__init__()
        self.heads, d = heads, width // heads
        self.embed = nn.Embedding(19, width)
        self.gain = nn.Parameter(torch.ones(width))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, 64), nn.Linear(width, 64)
        self.down, self.head = nn.Linear(64, width), nn.Linear(width, 19)
        self.register_buffer("plugh", 500000.0 ** (-torch.arange(0, d, 2) / d))
        self.register_buffer("veil", torch.full((length, length), -1e9).triu(1))

    def normed(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) * self.gain

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        n, t, width = x.shape
        phases = torch.outer(torch.arange(t), self.plugh).repeat(1, 2)
        q, k, v = self.qkv(self.normed(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (self.turned(each, phases.cos(), phases.sin()) for each in (q, k))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + self.veil[:t, :t]
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, width))
        y = self.normed(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.normed(x))  # type: ignore[no-any-return]


class DiT(nn.Module):
    """A transformer over patches, modulated by the embedding of a noise level."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch, self.place = (
            nn.Conv2d(3, width, 4, 4),
            nn.Parameter(torch.randn(16, width) / 50),
        )
        self.when = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 6 * width))
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU("tanh"), nn.Linear(64, width))
        self.last = nn.Linear(width, 48)
        self.register_buffer("grue", torch.exp(-torch.arange(width // 2) / (width // 2) * 9.2103))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        angles = level[:, None] * self.grue
        shift1, scale1, gate1, shift2, scale2, gate2 = self.when(
            torch.cat([angles.cos(), angles.sin()], -1)
        )[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attend(y, y, y, need_weights=False)[0]
        x = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return self.last(x)  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Down, middle and up, with a sinusoid of the time step added in the middle."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.GroupNorm(2, width), nn.SiLU())
        self.when = nn.Linear(width, width)
        self.middle = nn.Sequential(
            nn.GroupNorm(2, width), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1)
        )
        self.up = nn.ConvTranspose2d(2 * width, 3, 4, 2, 1)
        self.register_buffer("xyzzy", torch.exp(-torch.arange(width // 2) / (width // 2) * 9.2103))

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        low = self.down(x)
        angles = step[:, None].float() * self.xyzzy[None]
        when = self.when(torch.cat((angles.sin(), angles.cos()), 1))
        y = self.middle(low + when[:, :, None, None])
        return self.up(torch.cat((low, y), 1))  # type: ignore[no-any-return]


class ConvNet(nn.Module):
    """Standardises its images by buffers, with batch norms and the usual head."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("spread", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.body((images - self.centre) / self.spread)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Speech(nn.Module):
    """An LSTM over packed sequences; its loss is inside and needs FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, 2, batch_first=True, bidirectional=True)
        self.out, self.criterion = nn.Linear(32, 10), nn.CTCLoss()

    def forward(self, wave: Tensor, frames: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(wave, frames, True, enforce_sorted=False)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        scores = self.out(h).log_softmax(-1).transpose(0, 1)
        return self.criterion(scores, words, frames, lengths)  # type: ignore[no-any-return]


class Graph(nn.Module):
    """Two rounds of messages, weighted by edge; counts its passes and tracks degrees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("passes", torch.zeros(1))
        self.register_buffer("degree", torch.ones(12))

    def forward(self, nodes: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
        source, target = edges
        degree = torch.zeros_like(self.degree).index_add_(0, target, weights)
        self.passes += 1
        self.degree.lerp_(degree, 0.01)
        h = nodes
        for layer in (self.first, self.second):
            h = layer(h)
            sent = weights[:, None] * h[source]
            h = F.relu(h + torch.zeros_like(h).index_add_(0, target, sent) / self.degree[:, None])
        return self.out(h)  # type: ignore[no-any-return]


class Quantizer(nn.Module):
    """An autoencoder whose codebook is an average of what was quantised to it (VQ-VAE)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, width), nn.Linear(width, 6)
        axes = torch.eye(width)  # far from each other, lest a rounding choose another code
        self.register_buffer("book", 2.1 * torch.cat((axes, -axes)))
        self.register_buffer("size", torch.ones(2 * width))
        self.register_buffer("total", self.book.clone())

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        distances = (
            z.square().sum(1, keepdim=True) - 2 * z @ self.book.t() + self.book.square().sum(1)
        )
        chosen = distances.argmin(1)
        found = F.embedding(chosen, self.book)
        if self.training:
            with torch.no_grad():
                hot = F.one_hot(chosen, len(self.book)).to(z.dtype)
                self.size.data.mul_(0.99).add_(hot.sum(0), alpha=0.01)
                self.total.data.mul_(0.99).add_(hot.t() @ z, alpha=0.01)
                self.book.data.copy_(self.total / self.size[:, None])
        return self.decode(z + (found - z).detach())  # type: ignore[no-any-return]


def _spectral(old: bool) -> nn.Module:
    norm = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(6, 16)), nn.LeakyReLU(), norm(nn.Linear(16, 1)))


def _orthogonal(way: str) -> nn.Module:
    made = nn.utils.parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map=way)
    return nn.Sequential(made, nn.Tanh(), nn.Linear(6, 2))


def rows() -> dict[str, Callable[[], Row]]:
    """By name, what builds each row; the same numbers on every call after the same seed."""

    def of(build: Callable[[], nn.Module], **batch: Any) -> Callable[[], Row]:
        return lambda: Row(build(), batch, pulled)

    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(1, high, shape, generator=generator)

    speech = {
        "wave": normal(3, 12, 8),
        "frames": torch.tensor([12, 7, 10]),
        "words": whole(10, 3, 3),
        "lengths": torch.tensor([3, 2, 3]),
    }
    return {
        "GPT": of(GPT, tokens=tokens()),
        "rotary": of(Rotary, ids=whole(19, 2, 16)),
        "DiT": of(DiT, x=normal(2, 3, 16, 16), level=torch.tensor([999.0, 3.5])),
        "UNet": of(UNet, x=normal(2, 3, 8, 8), step=torch.tensor([999.0, 17.0])),
        "ConvNet": of(ConvNet, images=normal(4, 3, 12, 12).sigmoid()),
        "LSTM + CTC": lambda: Row(Speech(), speech, lambda loss: loss.float()),
        "graph": of(
            Graph, nodes=normal(12, 6), edges=whole(12, 2, 30), weights=normal(30).sigmoid()
        ),
        "VQ": of(Quantizer, x=normal(16, 6)),
        "spectral norm": of(lambda: _spectral(False), input=normal(8, 6)),
        "spectral norm by hooks": of(lambda: _spectral(True), input=normal(8, 6)),
        "orthogonal by matrix_exp": of(lambda: _orthogonal("matrix_exp"), input=normal(8, 6)),
        "orthogonal by Cayley": of(lambda: _orthogonal("cayley"), input=normal(8, 6)),
        "orthogonal by Householder": of(lambda: _orthogonal("householder"), input=normal(8, 6)),
        "BatchNorm": of(
            lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)),
            input=100 * normal(16, 6),
        ),
        "max_norm": of(
            lambda: nn.Sequential(nn.Embedding(10, 6, max_norm=1.0), nn.Linear(6, 2)),
            input=whole(10, 4, 3),
        ),
    }
