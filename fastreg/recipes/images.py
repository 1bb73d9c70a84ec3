"""What the image data sets share: their normalisation and augmentation, and the split of their training images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.recipes.data import Split

PADDING = 4


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``[N, C, H, W]`` uint8 to ``(images / 255 - mean) / std``, float32; mean and std are per channel.

    Example:
        >>> normalise(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), mean=(0.5,), std=(0.25,)).item()
        2.0
    """
    shift, scale = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    return (images.float() / 255 - shift) / scale


def crop(images: Tensor, generator: torch.Generator, mirror: bool) -> Tensor:
    """Pad by 4 black pixels, cut a window of the old size at random; with ``mirror`` turn half of the images around.

    Args:
        images: ``[N, C, H, W]``.
        generator: source of the offsets and of the mirroring, on the CPU.
        mirror: whether left and right are exchanged in half of the images.

    Returns:
        ``[N, C, H, W]``, one offset and one mirroring per image.

    Example:
        >>> crop(torch.ones(2, 3, 32, 32), torch.Generator(), mirror=True).shape
        torch.Size([2, 3, 32, 32])
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (PADDING,) * 4)
    top, left = (torch.randint(2 * PADDING + 1, (count, 1), generator=generator) for _ in range(2))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if mirror:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    # Indexing around the channel dimension moves it last.
    picked = padded.permute(0, 2, 3, 1)[tuple(part.to(images.device) for part in index)]
    return picked.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class ImageTransform:
    """The transform of an image data set: normalised, and cropped first when a generator is given.

    Args:
        mean: of the training images per channel, scaled to [0, 1].
        std: their standard deviation over images and pixels per channel.
        mirror: whether augmentation also exchanges left and right.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mirror: bool

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        augmented = images if generator is None else crop(images, generator, self.mirror)
        return normalise(augmented, self.mean, self.std)


def hold_out(split: Split, one_in: int) -> tuple[Split, Split]:
    """The samples in their order, cut before the last ``1 / one_in`` of them, rounded down: train and validation.

    Example:
        >>> train, validation = hold_out(Split(torch.zeros(9, 1, 1, 1), torch.arange(9)), one_in=4)
        >>> len(train), validation.targets.tolist()
        (7, [7, 8])
    """
    count = len(split) - len(split) // one_in
    return (
        Split(split.inputs[:count], split.targets[:count]),
        Split(split.inputs[count:], split.targets[count:]),
    )
