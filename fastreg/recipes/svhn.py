"""SVHN (Netzer et al. 2011), house numbers cut into digits of 32 x 32 pixels, from its MATLAB files."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import torch

from fastreg.errors import FastregError
from fastreg.optional import require
from fastreg.recipes.data import Dataset, Split
from fastreg.recipes.images import ImageTransform, hold_out

TRAIN_FILE, TEST_FILE = "train_32x32.mat", "test_32x32.mat"
# A damaged file can crash scipy's reader, and with it the interpreter: only the published bytes reach it, whose
# arrays and labels then need no further check.
MD5 = {TRAIN_FILE: "e26dedcc434d2e4c54c9b2d4a06d8373", TEST_FILE: "eb5a983be6a315427106f1b164d9cef3"}
# The published files hold 182 MB and 64 MB.
MAX_BYTES = 256 * 2**20
# The last tenth of the 73,257 training images, 7,325 of them, validates.
HELD_OUT = 10
# Per-channel mean and standard deviation of the training images, scaled to [0, 1]. A mirrored digit is no digit, so
# that images are only shifted: the published ones are off centre by a few pixels as well.
TRANSFORM = ImageTransform((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), mirror=False)


def svhn(directory: Path) -> Dataset:
    """SVHN with class 0 for the digit 0: train and validation from the training file, test from the test file.

    Args:
        directory: folder with ``train_32x32.mat`` and ``test_32x32.mat``; the extra images are not used.

    Returns:
        uint8 images ``[N, 3, 32, 32]``: the first nine tenths of the training images, the last
        tenth, and the test images; the transform crops, never mirrors, and normalises.

    Raises:
        FastregError: no such folder, a file that is missing or not the published one, or scipy is not installed.

    Example:
        >>> svhn(Path("svhn"))  # doctest: +SKIP
    """
    if not directory.is_dir():
        raise FastregError(f"svhn: directory must hold {TRAIN_FILE} and {TEST_FILE}, got {directory}, no such folder")
    train, validation = hold_out(_read(directory / TRAIN_FILE), HELD_OUT)
    return Dataset("svhn", train, validation, _read(directory / TEST_FILE), 10, TRANSFORM)


def _read(path: Path) -> Split:
    contents = require("scipy.io").loadmat(io.BytesIO(_published_bytes(path)), variable_names=("X", "y"))
    images = torch.from_numpy(contents["X"]).permute(3, 2, 0, 1).contiguous()  # from [32, 32, 3, N]
    # Classes run from 1 to 10, which stands for the digit 0.
    return Split(images, torch.from_numpy(contents["y"]).flatten().long() % 10)


def _published_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise _refusal(path, "a file of SVHN, format 2", "no such file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise _refusal(path, f"at most {MAX_BYTES} bytes", f"{size} bytes")
    contents = path.read_bytes()
    digest = hashlib.md5(contents, usedforsecurity=False).hexdigest()
    if digest != MD5[path.name]:
        raise _refusal(path, f"the published file, md5 {MD5[path.name]}", f"{size} bytes of md5 {digest}")
    return contents


def _refusal(path: Path, expected: str, received: str) -> FastregError:
    return FastregError(
        f"svhn: {path} must be {expected}, got {received} (download it again: ufldl.stanford.edu/housenumbers)"
    )
