"""Data of the recipes: the split of the digits, the readers of CIFAR and SVHN, augmentation."""

from __future__ import annotations

import hashlib
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import scipy.io
import torch
from sklearn.datasets import load_digits

from fastreg.errors import FastregError
from fastreg.recipes.cifar import TRANSFORM10, cifar10, cifar100
from fastreg.recipes.cifar_pickle import CIFAR10, CIFAR100, PIXELS, PickledImages, read_image_file
from fastreg.recipes.data import Dataset, digits
from fastreg.recipes.datasets import load_dataset
from fastreg.recipes.images import ImageTransform, crop, normalise
from fastreg.recipes.svhn import MAX_BYTES, MD5, TEST_FILE, TRAIN_FILE, TRANSFORM, svhn


def images_and_labels(count: int, seed: int = 0, classes: int = 10) -> tuple[numpy.ndarray, list[int]]:
    source = numpy.random.default_rng(seed)
    images = source.integers(0, 256, (count, PIXELS), dtype=numpy.uint8)
    return images, source.integers(0, classes, count).tolist()


def write_python3(path: Path, images: numpy.ndarray, labels: list[int], key: bytes = b"labels") -> None:
    path.write_bytes(pickle.dumps({b"data": images, b"coarse_labels": [0], key: labels}, protocol=2))


def short_string(text: bytes) -> bytes:
    return b"U" + struct.pack("<B", len(text)) + text


def write_python2(path: Path, images: numpy.ndarray, labels: list[int], key: bytes = b"labels") -> None:
    """The opcodes of the published files, which Python 2 wrote: byte strings, old numpy names."""
    shape = b"".join(b"J" + struct.pack("<i", size) for size in images.shape)
    raw = images.tobytes()
    numbers = b"".join(b"K" + struct.pack("<B", label) for label in labels)
    dtype_state = b"(K\x03" + short_string(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    path.write_bytes(
        b"\x80\x02}q\x01("
        + short_string(b"batch_label") + short_string(b"training batch 1 of 5")
        + short_string(key) + b"](" + numbers + b"e"
        + short_string(b"data")
        + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short_string(b"b")
        + b"\x87R(K\x01" + shape + b"\x86"
        + b"cnumpy\ndtype\n" + short_string(b"u1") + b"K\x00K\x01\x87R" + dtype_state
        + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
        + short_string(b"filenames") + b"](" + short_string(b"a.png") + b"eu."
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate((*CIFAR10.train_files, CIFAR10.test_file)):
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


@pytest.mark.parametrize("form", [CIFAR10, CIFAR100])
@pytest.mark.parametrize("write", [write_python2, write_python3])
def test_image_file_reads_back(write: Callable[..., None], form: PickledImages, tmp_path: Path) -> None:
    images, labels = images_and_labels(40, classes=form.classes)
    assert form is CIFAR10 or max(labels) > 9
    write(tmp_path / "batch", images, labels, form.labels)
    read = read_image_file(tmp_path / "batch", form)
    assert numpy.array_equal(read.inputs.numpy(), images.reshape(40, 3, 32, 32))
    assert read.targets.tolist() == labels


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
    read = read_image_file(tmp_path / "batch", CIFAR10)
    assert numpy.array_equal(read.inputs.numpy(), images.reshape(5, 3, 32, 32))


def test_cifar10_keeps_the_last_fifth_for_validation(folder: Path) -> None:
    data = cifar10(folder)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [40, 10, 10]
    last, _ = images_and_labels(10, seed=4)
    assert numpy.array_equal(data.validation.inputs.numpy(), last.reshape(10, 3, 32, 32))
    assert data.train.inputs.dtype == torch.uint8


@pytest.fixture
def folder100(tmp_path: Path) -> Path:
    for seed, (name, count) in enumerate({"train": 20, "test": 5}.items()):
        write_python2(tmp_path / name, *images_and_labels(count, seed, classes=100), b"fine_labels")
    return tmp_path


def test_cifar100_keeps_the_last_fifth_for_validation(folder100: Path) -> None:
    data = load_dataset("cifar100", folder100)
    assert (data.name, data.num_classes) == ("cifar100", 100)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [16, 4, 5]
    images, labels = images_and_labels(20, classes=100)
    assert numpy.array_equal(data.validation.inputs.numpy(), images[16:].reshape(4, 3, 32, 32))
    assert data.train.targets.tolist() + data.validation.targets.tolist() == labels
    assert data.test.targets.tolist() == images_and_labels(5, seed=1, classes=100)[1]


def test_cifar100_names_itself_in_errors(folder100: Path) -> None:
    write_python3(folder100 / "test", *images_and_labels(5))
    with pytest.raises(FastregError, match=r"cifar100: .*test must be .*list of 5 numbers under b'fine_labels'"):
        cifar100(folder100)
    write_python3(folder100 / "test", images_and_labels(1)[0], [100], b"fine_labels")
    with pytest.raises(FastregError, match=r"labels from 0 to 99, .*\(unpack cifar-100-python.tar.gz again\)"):
        cifar100(folder100)
    (folder100 / "train").unlink()
    with pytest.raises(FastregError, match="cifar100: .*train must be a file of cifar-100-python, got no such file"):
        cifar100(folder100)


def write_svhn(path: Path, images: numpy.ndarray, digits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout of the published files, whose md5 is then taken to be the one of this file."""
    labels = numpy.array([[digit or 10] for digit in digits], dtype=numpy.uint8)
    arrays = {"X": images.reshape(-1, 3, 32, 32).transpose(2, 3, 1, 0), "y": labels}
    scipy.io.savemat(path, arrays, do_compression=True)
    monkeypatch.setitem(MD5, path.name, hashlib.md5(path.read_bytes()).hexdigest())


@pytest.fixture
def house_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_svhn(tmp_path / TRAIN_FILE, *images_and_labels(29), monkeypatch)
    write_svhn(tmp_path / TEST_FILE, *images_and_labels(12, seed=1), monkeypatch)
    return tmp_path


def test_svhn_reads_back_and_keeps_the_last_tenth_for_validation(house_numbers: Path) -> None:
    data = load_dataset("svhn", house_numbers)
    images, digits_shown = images_and_labels(29)
    assert {0, 9} <= set(digits_shown)
    assert (data.name, data.num_classes) == ("svhn", 10)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [27, 2, 12]
    read = torch.cat([data.train.inputs, data.validation.inputs])
    assert numpy.array_equal(read.numpy(), images.reshape(29, 3, 32, 32))
    assert data.train.targets.tolist() + data.validation.targets.tolist() == digits_shown
    assert (read.dtype, data.test.targets.dtype) == (torch.uint8, torch.int64)
    assert data.test.targets.tolist() == images_and_labels(12, seed=1)[1]


def test_svhn_reads_only_the_published_bytes(house_numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = bytearray((house_numbers / TEST_FILE).read_bytes())
    contents[200] ^= 1
    (house_numbers / TEST_FILE).write_bytes(contents)

    def reached(*arguments: object, **options: object) -> dict[str, numpy.ndarray]:
        raise AssertionError("scipy was given a damaged file")

    expected = MD5[TEST_FILE]
    with pytest.raises(FastregError, match=f"{TEST_FILE} must be the published file, md5 {expected}, got .*md5 "):
        svhn(house_numbers)
    monkeypatch.setattr(scipy.io, "loadmat", reached)
    (house_numbers / TRAIN_FILE).write_bytes(contents)
    with pytest.raises(FastregError, match=f"{TRAIN_FILE} must be the published file"):
        svhn(house_numbers)


def test_svhn_names_missing_and_oversized_files(house_numbers: Path) -> None:
    with (house_numbers / TEST_FILE).open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(FastregError, match=f"{TEST_FILE} must be at most {MAX_BYTES} bytes, got {MAX_BYTES + 1}"):
        svhn(house_numbers)
    (house_numbers / TRAIN_FILE).unlink()
    with pytest.raises(FastregError, match=f"{TRAIN_FILE} must be a file of SVHN, format 2, got no such file"):
        svhn(house_numbers)
    with pytest.raises(FastregError, match="svhn: directory must hold train_32x32.mat and test_32x32.mat"):
        svhn(house_numbers / "absent")


@pytest.mark.parametrize(
    ("data", "directory", "message"),
    [
        ("digits", Path("x"), "data-dir must be absent for digits"),
        ("cifar10", None, "data-dir must be the folder cifar-10-batches-py for cifar10, got nothing"),
        ("cifar100", None, "data-dir must be the folder cifar-100-python for cifar100, got nothing"),
        ("svhn", None, "data-dir must be the folder of train_32x32.mat and test_32x32.mat for svhn"),
        ("mnist", None, r"data must be one of \['digits', 'cifar10', 'cifar100', 'svhn'\], got 'mnist'"),
    ],
)
def test_wrong_folder_or_name_is_refused(data: str, directory: Path | None, message: str) -> None:
    with pytest.raises(FastregError, match=message):
        load_dataset(data, directory)


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
        read_image_file(tmp_path / "batch", CIFAR10)
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
        read_image_file(tmp_path / "batch", CIFAR10)


def test_object_array_is_refused(tmp_path: Path) -> None:
    images = numpy.empty((1, PIXELS), dtype=object)
    write_python3(tmp_path / "batch", images, [1])
    with pytest.raises(FastregError, match="uint8 array"):
        read_image_file(tmp_path / "batch", CIFAR10)


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
        read_image_file(tmp_path / "batch", CIFAR10)


def test_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    write_python2(tmp_path / "batch", *images_and_labels(1))
    whole = (tmp_path / "batch").read_bytes()
    for length in (*range(0, 400, 7), len(whole) - 30, len(whole) - 1):
        (tmp_path / "batch").write_bytes(whole[:length])
        with pytest.raises(FastregError, match="batch must be"):
            read_image_file(tmp_path / "batch", CIFAR10)


def test_file_without_images_is_refused(tmp_path: Path) -> None:
    write_python2(tmp_path / "batch", IMAGES[:0], [])
    with pytest.raises(FastregError, match=r"shape \[N, 3072\], got shape \(0, 3072\)"):
        read_image_file(tmp_path / "batch", CIFAR10)


def test_array_shorter_than_its_shape_is_refused(tmp_path: Path) -> None:
    write_python2(tmp_path / "batch", *images_and_labels(2))
    two = struct.pack("<i", 2)
    damaged = (tmp_path / "batch").read_bytes().replace(b"J" + two, b"J" + struct.pack("<i", 3), 1)
    (tmp_path / "batch").write_bytes(damaged)
    with pytest.raises(FastregError, match="3 images of 3072 bytes"):
        read_image_file(tmp_path / "batch", CIFAR10)


def test_oversized_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "batch").open("wb") as stream:
        stream.truncate(CIFAR10.max_bytes + 1)
    with pytest.raises(FastregError, match="at most"):
        read_image_file(tmp_path / "batch", CIFAR10)


def test_missing_file_and_folder_are_named(folder: Path) -> None:
    (folder / "data_batch_3").unlink()
    with pytest.raises(FastregError, match="data_batch_3 must be .* no such file"):
        cifar10(folder)
    with pytest.raises(FastregError, match="directory must be .*absent"):
        cifar10(folder / "absent")


def loaded(name: str, request: pytest.FixtureRequest) -> Dataset:
    fixture = {"cifar10": "folder", "cifar100": "folder100", "svhn": "house_numbers"}[name]
    return load_dataset(name, request.getfixturevalue(fixture))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_transform_normalises_each_channel(name: str, request: pytest.FixtureRequest) -> None:
    transform = loaded(name, request).transform
    values = transform(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32), None)
    assert values.dtype == torch.float32
    for channel in range(3):
        black, white = (values[i, channel].unique().item() for i in range(2))
        assert black == pytest.approx(-transform.mean[channel] / transform.std[channel])
        assert white == pytest.approx((1 - transform.mean[channel]) / transform.std[channel])


def test_transform_of_its_own_data_has_mean_zero_and_variance_one() -> None:
    images = torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scaled = (images.double() / 255).transpose(0, 1).flatten(1)
    mean, std = (tuple(values.tolist()) for values in (scaled.mean(1), scaled.std(1, correction=0)))
    values = ImageTransform(mean, std, mirror=False)(images, None).double().transpose(0, 1).flatten(1)
    assert torch.allclose(values.mean(1), torch.zeros(3).double(), atol=1e-6)
    assert torch.allclose(values.std(1, correction=0), torch.ones(3).double(), atol=1e-6)


@pytest.mark.parametrize("mirror", [False, True])
def test_augmentation_is_a_padded_window_possibly_mirrored(mirror: bool) -> None:
    images = torch.arange(1, 1 + 12 * 3 * 32 * 32).view(12, 3, 32, 32)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    augmented = crop(images, torch.Generator().manual_seed(3), mirror)
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
    assert {mirrored for _, _, mirrored in seen} == ({False, True} if mirror else {False})
    assert len({(top, left) for top, left, _ in seen}) > 3


def test_only_photographs_are_mirrored() -> None:
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(40, 3, 8, 8)

    def rising(transform: ImageTransform) -> set[bool]:
        middle = transform(images, torch.Generator().manual_seed(0))[:, 0, 4]
        # Brightness grows from left to right before padding: where the largest pixel sits tells which way it faces.
        row = [image[image > image.min()] for image in middle]
        return {bool(pixels[-1] > pixels[0]) for pixels in row if len(pixels) > 1}

    assert rising(TRANSFORM10) == {False, True}
    assert rising(TRANSFORM) == {True}


@pytest.mark.parametrize("transform", [TRANSFORM10, TRANSFORM])
def test_augmentation_follows_the_generator_and_evaluation_has_none(transform: ImageTransform) -> None:
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    first, second = (transform(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    plain = normalise(images, transform.mean, transform.std)
    assert torch.equal(transform(images, None), plain)
    assert not torch.equal(first, plain)
