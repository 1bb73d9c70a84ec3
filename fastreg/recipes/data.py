"""Data sets as tensors in memory, split into train, validation and test."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fastreg.optional import require

# The split is part of the task, not of the run: every seed of every method sees the same one.
DIGITS_SPLIT_SEED = 0
DIGITS_TRAIN, DIGITS_VALIDATION = 1024, 273


@dataclass(frozen=True)
class Split:
    """Samples and their classes.

    Args:
        inputs: ``[N, C, H, W]``, uint8 or float32.
        targets: ``[N]`` int64.
    """

    inputs: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: str) -> "Split":
        """The same samples on ``device``."""
        return Split(self.inputs.to(device), self.targets.to(device))


# Raw inputs to model inputs; with a generator the result is also augmented.
Transform = Callable[[torch.Tensor, torch.Generator | None], torch.Tensor]


def unchanged(inputs: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """The transform of data that needs none."""
    return inputs


@dataclass(frozen=True)
class Dataset:
    """Three splits and the transform from stored inputs to model inputs.

    Settings are chosen on ``validation``; ``test`` is only ever reported.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    transform: Transform = unchanged

    def to(self, device: str) -> "Dataset":
        """The same data set on ``device``."""
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
        )


def digits() -> Dataset:
    """The 1,797 handwritten digits that scikit-learn ships (Alpaydin and Kaynak 1998).

    Returns:
        Images ``[N, 1, 8, 8]`` in [0, 1], split 1024 / 273 / 500 by a fixed permutation.

    Raises:
        FastregError: scikit-learn is not installed.

    Example:
        >>> data = digits()
        >>> len(data.train), len(data.validation), len(data.test)
        (1024, 273, 500)
    """
    bunch = require("sklearn.datasets").load_digits()
    # Pixels count the set bits of 4 x 4 blocks: 0 to 16.
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    classes = torch.from_numpy(bunch.target).long()
    order = torch.randperm(
        len(classes), generator=torch.Generator().manual_seed(DIGITS_SPLIT_SEED)
    )
    rest = len(classes) - DIGITS_TRAIN - DIGITS_VALIDATION
    train, validation, test = (
        Split(images[index], classes[index])
        for index in order.split([DIGITS_TRAIN, DIGITS_VALIDATION, rest])
    )
    return Dataset("digits", train, validation, test, num_classes=10)
