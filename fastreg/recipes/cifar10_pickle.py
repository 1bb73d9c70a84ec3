"""Reader of one CIFAR-10 python file, a pickle of which only the expected contents are admitted.

A pickle names the callables that rebuild its objects, so a plain ``pickle.load`` of a hostile file
runs whatever the file names. The reader here replaces the four names that a pickled uint8 array
needs by inert stand-ins and refuses every other name; numpy's own constructors never see the file.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from fastreg.errors import FastregError

PIXELS = 3 * 32 * 32
CLASSES = 10
# A genuine file holds 10,000 images in 31 MB.
MAX_BYTES = 64 * 2**20

# What the unpickler raises on bytes that are not the pickle it expects.
DAMAGED = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
    UnicodeError,
    ValueError,
)


class _Array:
    """What ``numpy.core.multiarray._reconstruct`` stands for: keeps the state, builds nothing."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Dtype:
    """What ``numpy.dtype`` stands for: keeps the type code; a byte has no byte order to set."""

    __slots__ = ("code",)

    def __init__(self, code: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        pass


class _StandIn:
    """A callable of the file. Instances carry no attributes, so the file cannot alter them."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("state for a function")


class _Reconstruct(_StandIn):
    __slots__ = ()

    def __call__(self, subtype: object, shape: object, code: object) -> _Array:
        return _Array()


class _MakeDtype(_StandIn):
    __slots__ = ()

    def __call__(self, code: object, align: object, copy: object) -> _Dtype:
        return _Dtype(code)


class _Encode(_StandIn):
    """``_codecs.encode``: how Python 3 writes bytes into the pickle protocol of these files."""

    __slots__ = ()

    def __call__(self, text: object, encoding: object) -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError("bytes in an unknown encoding")
        return text.encode("latin1")


class _Name(_StandIn):
    """The class ``numpy.ndarray``, which the file only passes on as an argument."""

    __slots__ = ()


ADMITTED: dict[tuple[str, str], _StandIn] = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): _Name(),
    ("numpy", "dtype"): _MakeDtype(),
    ("_codecs", "encode"): _Encode(),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _StandIn:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which image files never do")
        return ADMITTED[module, name]


@dataclass(frozen=True)
class ImageFile:
    """Contents of one file: ``images`` ``[N, 3, 32, 32]`` uint8 and ``classes`` ``[N]`` int64."""

    images: torch.Tensor
    classes: torch.Tensor


def _refusal(path: Path, expected: str, received: object) -> FastregError:
    return FastregError(
        f"cifar10: {path} must be {expected}, got {received} "
        "(unpack cifar-10-python.tar.gz again)"
    )


def _load(path: Path) -> dict[object, object]:
    if not path.is_file():
        raise _refusal(path, "a file of the python version of CIFAR-10", "no such file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise _refusal(path, f"at most {MAX_BYTES} bytes", f"{size} bytes")
    try:
        with path.open("rb") as stream:
            contents = _Unpickler(stream, encoding="bytes").load()
    except DAMAGED as error:
        raise _refusal(path, "an undamaged CIFAR-10 pickle", repr(error)) from error
    if not isinstance(contents, dict):
        raise _refusal(path, "a pickled dict", type(contents).__name__)
    return contents


def _is_shape(shape: object) -> bool:
    # bool is an int to isinstance, so types are compared.
    return (
        isinstance(shape, tuple)
        and [type(size) for size in shape] == [int, int]
        and shape[0] > 0
        and shape[1] == PIXELS
    )


def _images(path: Path, array: object) -> torch.Tensor:
    state = array.state if isinstance(array, _Array) else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise _refusal(path, "a dict with an array under b'data'", type(array).__name__)
    _, shape, dtype, column_major, raw = state
    if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", b"u1"):
        raise _refusal(path, "a uint8 array", "another type")
    if not _is_shape(shape):
        raise _refusal(path, f"an array of shape [N, {PIXELS}]", f"shape {shape}")
    if not isinstance(raw, bytes) or len(raw) != shape[0] * PIXELS:
        raise _refusal(path, f"{shape[0]} images of {PIXELS} bytes", "another number of bytes")
    # torch views the buffer; bytearray gives it one of its own that may be written.
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    rows = flat.view(PIXELS, shape[0]).T if column_major else flat.view(shape[0], PIXELS)
    return rows.reshape(-1, 3, 32, 32)


def _classes(path: Path, labels: object, count: int) -> torch.Tensor:
    if not isinstance(labels, list) or len(labels) != count:
        raise _refusal(path, f"a dict with a list of {count} numbers under b'labels'", "otherwise")
    if not all(type(label) is int and 0 <= label < CLASSES for label in labels):
        raise _refusal(path, f"a file with labels from 0 to {CLASSES - 1}", "other labels")
    return torch.tensor(labels)


def read_image_file(path: Path) -> ImageFile:
    """Read one ``data_batch_*`` or ``test_batch`` file.

    Args:
        path: the file, a protocol 2 pickle of ``{b"data": uint8 [N, 3072], b"labels": list}``
            (Krizhevsky 2009, "Learning multiple layers of features from tiny images").

    Returns:
        Its images and classes.

    Raises:
        FastregError: missing, damaged or truncated file, wrong sizes, or a pickle that names
            anything but a uint8 array; nothing that the file names is run.

    Example:
        >>> read_image_file(Path("cifar-10-batches-py/test_batch"))  # doctest: +SKIP
    """
    contents = _load(path)
    images = _images(path, contents.get(b"data"))
    return ImageFile(images, _classes(path, contents.get(b"labels"), len(images)))
