"""Functions of a parameter alone whose result may still be tracked: views, slices, casts, broadcasts.

Each entry says, for a call, whether the transposed map keeps Euclidean norms. If it does and the parameter has no
other use, the norm of the result's gradient is the parameter's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _always(*args: object, **kwargs: object) -> bool:
    return True


def _never(*args: object, **kwargs: object) -> bool:
    return False


def _basic_index(tensor: Tensor, index: object) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items)



def _getter(name: str) -> Callable[..., Any]:
    """Of a property of tensors: what a torch function mode is given."""
    return getattr(Tensor, name).__get__


_REARRANGEMENTS = (
    "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "view", "reshape", "flatten",
    "unflatten", "unsqueeze", "squeeze", "ravel", "contiguous", "clone", "view_as", "reshape_as", "flip",
    "narrow", "select", "chunk", "split", "tensor_split", "unbind", "diagonal",
    "to", "float", "double", "half", "bfloat16", "type", "type_as",
)  # fmt: skip
_BROADCASTS = ("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave", "index_select", "gather")

VIEWS: dict[Callable[..., Any], Callable[..., bool]] = {
    _getter("T"): _always,
    _getter("mT"): _always,
    Tensor.__getitem__: _basic_index,
}
for _names, _isometric in ((_REARRANGEMENTS, _always), (_BROADCASTS, _never)):
    for _name in _names:
        for _namespace in (torch, Tensor):
            if hasattr(_namespace, _name):
                VIEWS[getattr(_namespace, _name)] = _isometric
