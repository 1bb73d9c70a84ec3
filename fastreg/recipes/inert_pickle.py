"""An unpickler of uint8 arrays that runs nothing a file names.

A pickle names the callables that rebuild its objects, so a plain ``pickle.load`` of a hostile file
runs whatever the file names. The unpickler here replaces the four names that a pickled uint8 array
needs by inert stand-ins and refuses every other name; numpy's own constructors never see the file.
"""

from __future__ import annotations

import pickle

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


class InertArray:
    """What ``numpy.core.multiarray._reconstruct`` stands for: keeps the state, builds nothing."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class InertDtype:
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

    def __call__(self, subtype: object, shape: object, code: object) -> InertArray:
        return InertArray()


class _MakeDtype(_StandIn):
    __slots__ = ()

    def __call__(self, code: object, align: object, copy: object) -> InertDtype:
        return InertDtype(code)


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


class InertUnpickler(pickle.Unpickler):
    """Of files of plain values and uint8 arrays, which become :class:`InertArray`; other names are refused."""

    def find_class(self, module: str, name: str) -> _StandIn:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which image files never do")
        return ADMITTED[module, name]
