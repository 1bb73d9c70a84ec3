"""The data sets by name, and the folders of those that are not shipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastreg.errors import FastregError
from fastreg.recipes.cifar import cifar10, cifar100
from fastreg.recipes.data import Dataset, digits
from fastreg.recipes.svhn import svhn


@dataclass(frozen=True)
class Files:
    """A data set that is read from files: its loader, what the folder is called or holds, where to get it."""

    load: Callable[[Path], Dataset]
    folder: str
    address: str


FROM_FILES: dict[str, Files] = {
    "cifar10": Files(cifar10, "cifar-10-batches-py", "www.cs.toronto.edu/~kriz/cifar.html"),
    "cifar100": Files(cifar100, "cifar-100-python", "www.cs.toronto.edu/~kriz/cifar.html"),
    "svhn": Files(svhn, "of train_32x32.mat and test_32x32.mat", "ufldl.stanford.edu/housenumbers"),
}
SHIPPED: dict[str, Callable[[], Dataset]] = {"digits": digits}


def check_directory(data: str, directory: Path | None) -> None:
    """Refuse a folder for data that is shipped, none for data that is not, and unknown data.

    Raises:
        FastregError: as said.

    Example:
        >>> check_directory("digits", None)
    """
    if data in SHIPPED:
        if directory is not None:
            raise FastregError(
                f"train: data-dir must be absent for {data}, got {directory} (the digits come with scikit-learn)"
            )
    elif data not in FROM_FILES:
        raise FastregError(f"train: data must be one of {[*SHIPPED, *FROM_FILES]}, got {data!r}")
    elif directory is None:
        files = FROM_FILES[data]
        raise FastregError(
            f"train: data-dir must be the folder {files.folder} for {data}, got nothing ({files.address})"
        )


def load_dataset(data: str, directory: Path | None) -> Dataset:
    """The data set by name; ``directory`` holds the files of those that are not shipped.

    Args:
        data: ``"digits"``, or ``"cifar10"``, ``"cifar100"`` or ``"svhn"`` with the folder of its files.
        directory: that folder.

    Raises:
        FastregError: an unknown name, a directory that is missing or not wanted, or its files are.

    Example:
        >>> load_dataset("digits", None).num_classes
        10
    """
    check_directory(data, directory)
    return SHIPPED[data]() if directory is None else FROM_FILES[data].load(directory)
