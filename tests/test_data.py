"""Data of the recipes: the split of the digits, the CIFAR-10 reader, augmentation."""

import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from sklearn.datasets import load_digits

from fastreg.errors import FastregError
from fastreg.recipes.cifar10 import (
    MEAN,
    STD,
    TEST_FILE,
    TRAIN_FILES,
    cifar10,
    crop_and_flip,
    normalise,
    transform,
)
from fastreg.recipes.cifar10_pickle import MAX_BYTES, PIXELS, read_image_file
from fastreg.recipes.data import digits


def images_and_labels(count: int, seed: int = 0) -> tuple[numpy.ndarray, list[int]]:
    source = numpy.random.default_rng(seed)
    images = source.integers(0, 256, (count, PIXELS), dtype=numpy.uint8)
    return images, source.integers(0, 10, count).tolist()


def write_python3(path: Path, images: numpy.ndarray, labels: list[int]) -> None:
    path.write_bytes(pickle.dumps({b"data": images, b"labels": labels}, protocol=2))


def short_string(text: bytes) -> bytes:
    return b"U" + struct.pack("<B", len(text)) + text


def write_python2(path: Path, images: numpy.ndarray, labels: list[int]) -> None:
    """The opcodes of the published files, which Python 2 wrote: byte strings, old numpy names."""
    shape = b"".join(b"J" + struct.pack("<i", size) for size in images.shape)
    raw = images.tobytes()
    numbers = b"".join(b"K" + struct.pack("<B", label) for label in labels)
    dtype_state = b"(K\x03" + short_string(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    path.write_bytes(
        b"\x80\x02}q\x01("
        + short_string(b"batch_label") + short_string(b"training batch 1 of 5")
        + short_string(b"labels") + b"](" + numbers + b"e"
        + short_string(b"data")
        + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short_string(b"b")
        + b"\x87R(K\x01" + shape + b"\x86"
        + b"cnumpy\ndtype\n" + short_string(b"u1") + b"K\x00K\x01\x87R" + dtype_state
        + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
        + short_string(b"filenames") + b"](" + short_string(b"a.png") + b"eu."
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate((*TRAIN_FILES, TEST_FILE)):
        write_python3(tmp_path / name, *images_and_labels(10, seed))
    return tmp_path


def test_digits_are_split_once_and_completely() -> None:
    data, again = digits(), digits()
    splits = (data.train, data.validation, data.test)
    assert [len(split) for split in splits] == [1024, 273, 500]
    assert torch.equal(data.train.inputs, again.train.inputs)
    counts = torch.cat([split.targets for split in splits]).bincount()
    assert counts.tolist() == numpy.bincount(load_digits().target).tolist()
    images = torch.cat([split.inputs for split in splits])
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 1)


@pytest.mark.parametrize("write", [write_python2, write_python3])
def test_image_file_reads_back(write: Callable[..., None], tmp_path: Path) -> None:
    images, labels = images_and_labels(7)
    write(tmp_path / "batch", images, labels)
    read = read_image_file(tmp_path / "batch")
    assert numpy.array_equal(read.images.numpy(), images.reshape(7, 3, 32, 32))
    assert read.classes.tolist() == labels


def test_python2_writer_makes_a_wellformed_pickle(tmp_path: Path) -> None:
    write_python2(tmp_path / "batch", *images_and_labels(2))
    names = [
        argument
        for code, argument, _ in pickletools.genops((tmp_path / "batch").read_bytes())
        if code.name == "GLOBAL"
    ]
    assert names == ["numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"]


def test_column_major_array_reads_back(tmp_path: Path) -> None:
    images, labels = images_and_labels(5)
    write_python3(tmp_path / "batch", numpy.asfortranarray(images), labels)
    read = read_image_file(tmp_path / "batch")
    assert numpy.array_equal(read.images.numpy(), images.reshape(5, 3, 32, 32))


def test_cifar10_keeps_the_last_fifth_for_validation(folder: Path) -> None:
    data = cifar10(folder)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [40, 10, 10]
    last, _ = images_and_labels(10, seed=4)
    assert numpy.array_equal(data.validation.inputs.numpy(), last.reshape(10, 3, 32, 32))
    assert data.train.inputs.dtype == torch.uint8


class Hostile:
    """Pickles to a call that creates a file, as an attack would run a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.target), "w")


@pytest.mark.parametrize("inside", [True, False])
def test_hostile_file_runs_no_code(inside: bool, tmp_path: Path) -> None:
    hostile, sign = Hostile(tmp_path / "ran"), tmp_path / "ran"
    contents = {b"data": hostile, b"labels": []} if inside else hostile
    (tmp_path / "batch").write_bytes(pickle.dumps(contents, protocol=2))
    with pytest.raises(FastregError, match=r"batch must be .*it names \w+\.open"):
        read_image_file(tmp_path / "batch")
    assert not sign.exists()
    # The same bytes do run under an ordinary load: the test would notice a reader that allows it.
    with pickle.loads(pickle.dumps(hostile, protocol=2)):
        assert sign.exists()


@pytest.mark.parametrize(
    "code",
    [
        # Attributes and dotted names of admitted modules.
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
        b"\x80\x02cnumpy\nload\n(U\x01xtR.",
        b"\x80\x02cbuiltins\neval\n(U\x011tR.",
        b"\x80\x02cposix\nsystem\n(U\x04truetR.",
        # State for an admitted callable, which would outlive the file.
        b"\x80\x02cnumpy\ndtype\n}U\x01xK\x01sb.",
        b"\x80\x02cnumpy\ndtype\nN}U\x01xK\x01s\x86b.",
        # The class is only an argument: calling it makes no array.
        b"\x80\x02cnumpy\nndarray\n(K\x01tR.",
        b"\x80\x02cnumpy\nndarray\n)\x81.",
        # Persistent and extension identifiers.
        b"\x80\x02U\x01xQ.",
        b"\x80\x02\x82\x01.",
    ],
)
def test_other_opcodes_are_refused(code: bytes, tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(code)
    with pytest.raises(FastregError, match="batch must be"):
        read_image_file(tmp_path / "batch")


def test_object_array_is_refused(tmp_path: Path) -> None:
    images = numpy.empty((1, PIXELS), dtype=object)
    write_python3(tmp_path / "batch", images, [1])
    with pytest.raises(FastregError, match="uint8 array"):
        read_image_file(tmp_path / "batch")


IMAGES, LABELS = images_and_labels(3)


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ([1], "pickled dict"),
        ({b"labels": LABELS}, "array under b'data'"),
        ({"data": IMAGES, "labels": LABELS}, "array under b'data'"),
        ({b"data": IMAGES}, "list of 3 numbers"),
        ({b"data": IMAGES, b"labels": LABELS[:2]}, "list of 3 numbers"),
        ({b"data": IMAGES, b"labels": [0, 1, 10]}, "labels from 0 to 9"),
        ({b"data": IMAGES, b"labels": [0, 1, -1]}, "labels from 0 to 9"),
        ({b"data": IMAGES, b"labels": [0, 1, True]}, "labels from 0 to 9"),
        ({b"data": IMAGES[:, :-1], b"labels": LABELS}, r"shape \[N, 3072\]"),
        ({b"data": IMAGES.astype(numpy.float32), b"labels": LABELS}, "uint8 array"),
        ({b"data": IMAGES.astype(numpy.int8), b"labels": LABELS}, "uint8 array"),
    ],
)
def test_wrong_contents_are_named(contents: object, expected: str, tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(pickle.dumps(contents, protocol=2))
    with pytest.raises(FastregError, match=expected):
        read_image_file(tmp_path / "batch")


def test_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    write_python2(tmp_path / "batch", *images_and_labels(1))
    whole = (tmp_path / "batch").read_bytes()
    for length in (*range(0, 400, 7), len(whole) - 30, len(whole) - 1):
        (tmp_path / "batch").write_bytes(whole[:length])
        with pytest.raises(FastregError, match="batch must be"):
            read_image_file(tmp_path / "batch")


def test_file_without_images_is_refused(tmp_path: Path) -> None:
    write_python2(tmp_path / "batch", IMAGES[:0], [])
    with pytest.raises(FastregError, match=r"shape \[N, 3072\], got shape \(0, 3072\)"):
        read_image_file(tmp_path / "batch")


def test_array_shorter_than_its_shape_is_refused(tmp_path: Path) -> None:
    write_python2(tmp_path / "batch", *images_and_labels(2))
    two = struct.pack("<i", 2)
    damaged = (tmp_path / "batch").read_bytes().replace(b"J" + two, b"J" + struct.pack("<i", 3), 1)
    (tmp_path / "batch").write_bytes(damaged)
    with pytest.raises(FastregError, match="3 images of 3072 bytes"):
        read_image_file(tmp_path / "batch")


def test_oversized_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "batch").open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(FastregError, match="at most"):
        read_image_file(tmp_path / "batch")


def test_missing_file_and_folder_are_named(folder: Path) -> None:
    (folder / "data_batch_3").unlink()
    with pytest.raises(FastregError, match="data_batch_3 must be .* no such file"):
        cifar10(folder)
    with pytest.raises(FastregError, match="directory must be .*absent"):
        cifar10(folder / "absent")


def test_normalise_by_hand() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    values = normalise(images)
    for channel in range(3):
        black, white = (values[i, channel].unique().item() for i in range(2))
        assert black == pytest.approx(-MEAN[channel] / STD[channel])
        assert white == pytest.approx((1 - MEAN[channel]) / STD[channel])


def test_augmentation_is_a_padded_window_possibly_mirrored() -> None:
    images = torch.arange(1, 1 + 6 * 3 * 32 * 32).view(6, 3, 32, 32)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    augmented = crop_and_flip(images, torch.Generator().manual_seed(3))
    seen = set()
    for image, source in zip(augmented, padded):
        matches = [
            (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
            if torch.equal(
                image.flip(-1) if mirrored else image,
                source[:, top : top + 32, left : left + 32],
            )
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert {mirrored for _, _, mirrored in seen} == {False, True}
    assert len({(top, left) for top, left, _ in seen}) > 3


def test_augmentation_follows_the_generator_and_evaluation_has_none() -> None:
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    first, second = (transform(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(transform(images, None), normalise(images))
    assert not torch.equal(first, normalise(images))
