"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the files of their python versions, without torchvision."""

from __future__ import annotations

from pathlib import Path

import torch

from fastreg.errors import FastregError
from fastreg.recipes.cifar_pickle import CIFAR10, CIFAR100, PickledImages, read_image_file
from fastreg.recipes.data import Dataset, Split
from fastreg.recipes.images import ImageTransform, hold_out

# One fifth validates, as in Novack et al. 2022, arXiv:2211.15853: images 40,000 to 49,999 of the full set.
HELD_OUT = 5
# Per-channel mean and standard deviation of the 50,000 training images, scaled to [0, 1].
TRANSFORM10 = ImageTransform((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), mirror=True)
TRANSFORM100 = ImageTransform((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), mirror=True)


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
    return _dataset(directory, CIFAR10, TRANSFORM10)


def cifar100(directory: Path) -> Dataset:
    """CIFAR-100 with its 100 fine labels: train and validation from the file ``train``, test from ``test``.

    Args:
        directory: folder with the files ``train`` and ``test``.

    Returns:
        As :func:`cifar10`.

    Raises:
        FastregError: no such folder, or a file that is missing, damaged or hostile.

    Example:
        >>> cifar100(Path("cifar-100-python"))  # doctest: +SKIP
    """
    return _dataset(directory, CIFAR100, TRANSFORM100)


def _dataset(directory: Path, form: PickledImages, transform: ImageTransform) -> Dataset:
    if not directory.is_dir():
        raise FastregError(f"{form.name}: directory must be the unpacked {form.folder}, got {directory}")
    files = [read_image_file(directory / name, form) for name in form.train_files]
    images = Split(torch.cat([file.inputs for file in files]), torch.cat([file.targets for file in files]))
    train, validation = hold_out(images, HELD_OUT)
    test = read_image_file(directory / form.test_file, form)
    return Dataset(form.name, train, validation, test, form.classes, transform)
