"""Argument checks of the public ops: cheap tests, formatted messages only on failure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.errors import FastregError

FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def _fail(function: str, argument: str, expected: str, received: object, hint: str) -> None:
    raise FastregError(f"{function}: {argument} must be {expected}, got {received} ({hint})")


def check_untracked(function: str, *tensors: Tensor) -> None:
    """Refuse inputs that autograd tracks: a private op has no gradient and would drop it silently."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                _fail(function, "input", "detached from autograd", "a tensor that requires grad",
                      "call the differentiable function of fastreg.functional, or use torch.no_grad()")


def check_floats(function: str, **tensors: Tensor) -> None:
    """All floating, of one dtype and on one device."""
    first, lead = next(iter(tensors.items()))
    dtype, device = lead.dtype, lead.device
    if dtype not in FLOATS:
        _fail(function, first, "float32, float64, bfloat16 or float16", dtype, "cast it first")
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            _fail(function, name, f"{dtype} as {first}", tensor.dtype, "cast one of them first")
        if tensor.device != device:
            _fail(function, name, f"on {device} as {first}", tensor.device, "move one of them first")


def check_shape(
    function: str, argument: str, tensor: Tensor, names: str, shape: Sequence[int | None]
) -> None:
    """The tensor has this shape; None in ``shape`` admits any size there."""
    actual = tensor.shape
    # Most calls name a whole shape, and comparing two of those is one C call.
    if actual == shape:
        return
    if len(actual) == len(shape):
        for size, wanted in zip(actual, shape, strict=True):
            if wanted is not None and size != wanted:
                break
        else:
            return
    sizes = ", ".join("any" if wanted is None else str(wanted) for wanted in shape)
    _fail(function, argument, f"{names} = [{sizes}]", list(actual), "shapes are listed in the docstring")


def check_dtype(function: str, argument: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Of this dtype."""
    if tensor.dtype != dtype:
        _fail(function, argument, str(dtype), tensor.dtype, "cast it first")


def check_index(function: str, argument: str, index: Tensor, data: Tensor) -> None:
    """int64, on the device of the data it indexes."""
    if index.dtype != torch.int64 or index.device != data.device:
        received = f"{index.dtype} on {index.device}"
        _fail(function, argument, f"int64 on {data.device}", received, "cast or move it")


def check_offsets(function: str, offsets: Sequence[int], rows: int) -> None:
    """From 0 to the number of rows. That they ascend is checked where they are grouped, once per set."""
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != rows:
        _fail(function, "offsets", f"ascending from 0 to {rows} rows", list(offsets[:16]),
              "offsets has one entry more than there are segments")


def check_rstd(function: str, rstd: Tensor, xhat: Tensor) -> None:
    """One reciprocal deviation per row, in the accumulator's dtype."""
    check_shape(function, "rstd", rstd, "[R]", (xhat.shape[0],))
    if rstd.dtype != accumulator(xhat.dtype):
        _fail(function, "rstd", str(accumulator(xhat.dtype)), rstd.dtype, "normalize returns it so")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
