"""A vision transformer for 32 x 32 images (Dosovitskiy et al. 2021, arXiv:2010.11929), in modules of torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ViT(nn.Module):
    """Patches, a class token, learned positions, pre-norm encoder blocks, a linear head on the class token.

    Args:
        width: of the residual stream; the feed-forward layers are four times as wide.
        depth: blocks.
        heads: of attention.
        patch: side of a patch, which divides ``image``.
        image: side of an image.
        classes: size of the output.

    Shapes:
        ``[B, 3, image, image]`` to ``[B, classes]``.

    Example:
        >>> import torch
        >>> ViT(width=12, depth=1, heads=3)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, width: int = 192, depth: int = 12, heads: int = 3, patch: int = 4, image: int = 32, classes: int = 10
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn((image // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(_block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def _block(width: int, heads: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
