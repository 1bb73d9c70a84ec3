"""Reader of one CIFAR-10 or CIFAR-100 python file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.recipes.data import Split
from fastreg.recipes.inert_pickle import DAMAGED, InertArray, InertDtype, InertUnpickler

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class PickledImages:
    """What the files of one data set look like: the name of its loader, where they come from, what they hold."""

    name: str
    folder: str
    archive: str
    train_files: tuple[str, ...]
    test_file: str
    labels: bytes
    classes: int
    max_bytes: int

    def refusal(self, path: Path, expected: str, received: object) -> FastregError:
        """The error of a file that is not one of these."""
        return FastregError(
            f"{self.name}: {path} must be {expected}, got {received} (unpack {self.archive} again)"
        )


# Genuine files hold 10,000 images in 31 MB, or 50,000 in 155 MB.
CIFAR10 = PickledImages(
    name="cifar10",
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    train_files=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test_file="test_batch",
    labels=b"labels",
    classes=10,
    max_bytes=64 * 2**20,
)
CIFAR100 = PickledImages(
    name="cifar100",
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    train_files=("train",),
    test_file="test",
    labels=b"fine_labels",
    classes=100,
    max_bytes=256 * 2**20,
)


def _load(path: Path, form: PickledImages) -> dict[object, object]:
    if not path.is_file():
        raise form.refusal(path, f"a file of {form.folder}", "no such file")
    size = path.stat().st_size
    if size > form.max_bytes:
        raise form.refusal(path, f"at most {form.max_bytes} bytes", f"{size} bytes")
    try:
        with path.open("rb") as stream:
            contents = InertUnpickler(stream, encoding="bytes").load()
    except DAMAGED as error:
        raise form.refusal(path, f"an undamaged pickle of {form.folder}", repr(error)) from error
    if not isinstance(contents, dict):
        raise form.refusal(path, "a pickled dict", type(contents).__name__)
    return contents


def _is_shape(shape: object) -> bool:
    # bool is an int to isinstance, so types are compared.
    return (
        isinstance(shape, tuple)
        and [type(size) for size in shape] == [int, int]
        and shape[0] > 0
        and shape[1] == PIXELS
    )


def _images(path: Path, array: object, form: PickledImages) -> Tensor:
    state = array.state if isinstance(array, InertArray) else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise form.refusal(path, "a dict with an array under b'data'", type(array).__name__)
    _, shape, dtype, column_major, raw = state
    if not isinstance(dtype, InertDtype) or dtype.code not in ("u1", b"u1"):
        raise form.refusal(path, "a uint8 array", "another type")
    if not _is_shape(shape):
        raise form.refusal(path, f"an array of shape [N, {PIXELS}]", f"shape {shape}")
    if not isinstance(raw, bytes) or len(raw) != shape[0] * PIXELS:
        raise form.refusal(path, f"{shape[0]} images of {PIXELS} bytes", "another number of bytes")
    # torch views the buffer; bytearray gives it one of its own that may be written.
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    rows = flat.view(PIXELS, shape[0]).T if column_major else flat.view(shape[0], PIXELS)
    return rows.reshape(-1, 3, 32, 32)


def _classes(path: Path, labels: object, count: int, form: PickledImages) -> Tensor:
    if not isinstance(labels, list) or len(labels) != count:
        raise form.refusal(path, f"a dict with a list of {count} numbers under {form.labels!r}", "otherwise")
    if not all(type(label) is int and 0 <= label < form.classes for label in labels):
        raise form.refusal(path, f"a file with labels from 0 to {form.classes - 1}", "other labels")
    return torch.tensor(labels)


def read_image_file(path: Path, form: PickledImages) -> Split:
    """Read one file of CIFAR-10 or CIFAR-100.

    Args:
        path: the file, a protocol 2 pickle of ``{b"data": uint8 [N, 3072], form.labels: list}``
            (Krizhevsky 2009, "Learning multiple layers of features from tiny images").
        form: ``CIFAR10`` or ``CIFAR100``.

    Returns:
        Its images, ``[N, 3, 32, 32]`` uint8, and their classes.

    Raises:
        FastregError: missing, damaged or truncated file, wrong sizes, or a pickle that names
            anything but a uint8 array; nothing that the file names is run.

    Example:
        >>> read_image_file(Path("cifar-10-batches-py/test_batch"), CIFAR10)  # doctest: +SKIP
    """
    contents = _load(path, form)
    images = _images(path, contents.get(b"data"), form)
    return Split(images, _classes(path, contents.get(form.labels), len(images), form))
