"""Tiny models, one per way in which a parameter can be used. Plain PyTorch; used by `cases.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualConv(nn.Module):
    """Two residual convolutions with group norm, pooling, linear head."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(2, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(2, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv1(F.gelu(self.norm1(x)))
        x = x + self.conv2(F.gelu(self.norm2(y)))
        return self.head(x.mean((-2, -1)))


class Attention(nn.Module):
    """Causal self-attention with one fused projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.reshape(split).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm transformer block, with LayerScale when `scale` is given."""

    def __init__(self, width: int, heads: int, scale: float | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = None if scale is None else nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.norm1(x))
        x = x + (y if self.scale is None else self.scale * y)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class TinyGPT(nn.Module):
    """Token and position embeddings (positions indexed once, without a batch), tied head."""

    def __init__(self, vocabulary: int = 7, length: int = 5, width: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.block = Block(width, heads=2)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens(index) + self.positions(torch.arange(index.shape[1]))
        return self.head(self.norm(self.block(x)))


class TinyViT(nn.Module):
    """Patch convolution, expanded class token, added positions, LayerScale."""

    def __init__(self, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, width, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        self.block = Block(width, heads=2, scale=0.5)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.block(x))[:, 0])


class EncoderClassifier(nn.Module):
    """`nn.TransformerEncoder`, batch first, between two linear layers."""

    def __init__(self, norm_first: bool, width: int = 6) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, 2, dim_feedforward=8, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.inward = nn.Linear(4, width)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.inward(x)).mean(1))


class RawParameters(nn.Module):
    """Parameters used through functions: @, .t(), addmm, a chunked weight, an added bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(5, 6) / 2)
        self.second = nn.Parameter(torch.randn(4, 6) / 2)
        self.offset = nn.Parameter(torch.randn(4))
        self.fused = nn.Parameter(torch.randn(8, 4) / 2)
        self.bias = nn.Parameter(torch.randn(3))
        self.head = nn.Parameter(torch.randn(3, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.first)
        x = torch.tanh(torch.addmm(self.offset, x, self.second.t()))
        left, right = self.fused.chunk(2)
        x = torch.sigmoid(F.linear(x, left)) * torch.tanh(F.linear(x, right))
        return torch.matmul(x, self.head.T) + self.bias


class Gates(nn.Module):
    """Elementwise parameters: a full-shape gate, a per-channel gate, a scalar, a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(3, 4))
        self.channel = nn.Parameter(torch.randn(4))
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(torch.randn(1, 3, 1))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x * self.gate + self.shift) * self.channel
        return self.head((self.scalar * x).sin().flatten(1))


class CalledTwice(nn.Module):
    """One module at two depths, and two modules that share one weight."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.block = nn.Linear(width, width)
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)
        self.right.weight = self.left.weight
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.block(torch.tanh(self.block(x))))
        return self.head(torch.tanh(self.left(x)) * torch.sigmoid(self.right(x)))


class LowRank(nn.Module):
    """A frozen layer with a trainable low-rank update: base(x) + B(A(x))."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class TokenMean(nn.Module):
    """Embedding with a padding index, mean over the sequence, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, padding_idx=0)
        self.head = nn.Linear(4, 3)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(index)).mean(1))


class TiedPadding(nn.Module):
    """The padding row gets no gradient as an embedding, and one as a row of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4, padding_idx=0)
        self.body = nn.Linear(4, 4)

    def forward(self, index: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.body(self.embedding(index))), self.embedding.weight)


class Recurrent(nn.Module):
    """An RNN of the given kind, batch first; the last state goes to a linear head."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.cell(x)
        return self.head(states[:, -1])


class WithUnused(nn.Module):
    """A layer and a parameter that the forward never reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.idle = nn.Linear(4, 5)
        self.orphan = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))
