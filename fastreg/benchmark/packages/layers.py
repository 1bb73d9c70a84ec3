"""Models in the form that packages with a rule per layer ask for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastreg.models import GPT


class TiedEmbedding(nn.Embedding):
    """An embedding whose weight another layer shares; of a type of its own, so that it gets a rule of its own."""


class TiedHead(nn.Linear):
    """A linear layer whose weight another layer shares."""


class LayeredGPT(nn.Module):
    """The same function of the same parameters as a :class:`GPT`, each parameter used by calling a layer that has it.

    Args:
        model: whose parameters and blocks are taken over.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        vocabulary, width = model.tokens.weight.shape
        self.tokens = TiedEmbedding(vocabulary, width)
        self.positions = nn.Embedding(*model.positions.shape)
        self.blocks, self.norm = model.blocks, model.norm
        self.head = TiedHead(width, vocabulary, bias=False)
        self.tokens.weight = self.head.weight = model.tokens.weight
        self.positions.weight = model.positions

    def forward(self, tokens: Tensor) -> Tensor:
        # Rules per layer look for the samples in the first dimension.
        at = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(at))))


def layered(model: nn.Module) -> nn.Module:
    """The model, all its parameters in layers; models other than a :class:`GPT` are given back as they are."""
    return LayeredGPT(model) if isinstance(model, GPT) else model
