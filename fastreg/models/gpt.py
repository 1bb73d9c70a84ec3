"""A GPT-2 shaped decoder (Radford et al. 2019): pre-LayerNorm, causal attention, tied head."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fastreg.errors import FastregError


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a :class:`GPT`.

    Raises:
        FastregError: a size below one, or a width that the heads do not divide.
    """

    vocab: int = 1024
    context: int = 128
    width: int = 256
    layers: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise FastregError(f"GPTConfig: {name} must be at least 1, got {value}")
        if self.width % self.heads:
            raise FastregError(
                f"GPTConfig: width must be a multiple of heads = {self.heads}, got {self.width}"
            )


class Attention(nn.Module):
    """Causal multi-head self-attention on ``[B, T, width]``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # [B, T, 3 * width] -> three of [B, heads, T, width / heads]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), the MLP four times as wide with a GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Decoder-only transformer with learned positions and a head tied to the token embedding.

    Weights start at N(0, 0.02), those that write to the residual stream at 0.02 / sqrt(2 layers).

    Shapes:
        tokens ``[B, T]`` int64, T <= context, to logits ``[B, T, vocab]``.

    Raises:
        FastregError: in ``forward``, tokens that are not ``[B, T]`` with T <= context.

    Example:
        >>> import torch
        >>> model = GPT(GPTConfig(vocab=50, context=16, width=32, layers=2, heads=4))
        >>> model(torch.randint(50, (3, 16))).shape
        torch.Size([3, 16, 50])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.tokens.weight, std=0.02)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                writes = name.endswith((".out", ".down"))
                std = 0.02 / math.sqrt(2 * self.config.layers) if writes else 0.02
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.dim() != 2 or tokens.shape[1] > self.config.context:
            raise FastregError(
                f"GPT: tokens must be [B, T] with T <= {self.config.context}, "
                f"got {list(tokens.shape)}"
            )
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)
