"""CIFAR-10 (Krizhevsky 2009) from the files of its python version, without torchvision."""

from pathlib import Path

import torch
import torch.nn.functional as F

from fastreg.errors import FastregError
from fastreg.recipes.cifar10_pickle import CLASSES, ImageFile, read_image_file
from fastreg.recipes.data import Dataset, Split

TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILE = "test_batch"
# Four fifths train, as in Novack et al. 2022: 40,000 of the 50,000 images of the full set.
TRAIN_SHARE = 4, 5
PADDING = 4
# Per-channel mean and standard deviation of the training images, scaled to [0, 1].
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """``[N, 3, H, W]`` uint8 to float32 of mean zero and variance one per channel."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pad by 4 black pixels, cut a window of the old size at random, mirror half of the images.

    Args:
        images: ``[N, C, H, W]``.
        generator: source of the offsets and of the mirroring, on the CPU.

    Returns:
        ``[N, C, H, W]``, one offset and one mirroring per image.

    Example:
        >>> crop_and_flip(torch.ones(2, 3, 32, 32), torch.Generator()).shape
        torch.Size([2, 3, 32, 32])
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (PADDING,) * 4)
    top = torch.randint(2 * PADDING + 1, (count, 1), generator=generator)
    left = torch.randint(2 * PADDING + 1, (count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    # Indexing around the channel dimension moves it last.
    picked = padded.permute(0, 2, 3, 1)[tuple(part.to(images.device) for part in index)]
    return picked.permute(0, 3, 1, 2).contiguous()


def transform(images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Normalised images, augmented when a generator is given."""
    return normalise(images if generator is None else crop_and_flip(images, generator))


def _join(files: list[ImageFile]) -> Split:
    return Split(
        torch.cat([file.images for file in files]), torch.cat([file.classes for file in files])
    )


def _head_and_tail(split: Split, count: int) -> tuple[Split, Split]:
    return (
        Split(split.inputs[:count], split.targets[:count]),
        Split(split.inputs[count:], split.targets[count:]),
    )


def cifar10(directory: Path) -> Dataset:
    """CIFAR-10: train and validation from the training files, test from the test file.

    Args:
        directory: folder with ``data_batch_1`` to ``data_batch_5`` and ``test_batch``.

    Returns:
        uint8 images ``[N, 3, 32, 32]``: the first four fifths of the training images, the last
        fifth, and the test images; the transform crops, mirrors and normalises.

    Raises:
        FastregError: no such folder, or a file that is missing, damaged or hostile.

    Example:
        >>> cifar10(Path("cifar-10-batches-py"))  # doctest: +SKIP
    """
    if not directory.is_dir():
        raise FastregError(
            f"cifar10: directory must be the unpacked cifar-10-batches-py, got {directory}"
        )
    images = _join([read_image_file(directory / name) for name in TRAIN_FILES])
    train, validation = _head_and_tail(images, len(images) * TRAIN_SHARE[0] // TRAIN_SHARE[1])
    test = _join([read_image_file(directory / TEST_FILE)])
    return Dataset("cifar10", train, validation, test, CLASSES, transform)
