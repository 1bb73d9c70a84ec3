"""Rules of ``F.conv1d``, ``F.conv2d``, ``F.conv3d`` and their transposes; the maths is in ``conv_maps``."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.rules.conv_implicit import Implicit
from fastreg.rules.conv_maps import Convolution
from fastreg.rules.conv_pointwise import Pointwise
from fastreg.rules.registry import route
from fastreg.rules.tape import Tape

Size = int | Sequence[int]


@route(F.conv1d, F.conv2d, F.conv3d)
def conv(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv1d``, ``F.conv2d`` and ``F.conv3d``."""
    _check_batched(tape, input, weight)
    axes = weight.dim() - 2
    stride, dilation = _per_axis(stride, axes), _per_axis(dilation, axes)
    if isinstance(padding, str):
        input, padding = _padded(input, weight, stride, padding, dilation)
    kernel, padding = tuple(weight.shape[2:]), _per_axis(padding, axes)
    if max(kernel) == 1 and max(padding) == 0 and groups == 1:
        form: type[Convolution] = Pointwise
    else:
        form = Implicit if Implicit.serves(input, axes, groups) else Convolution
    op = form(kernel, stride, padding, dilation, groups, False, (0,) * axes)
    return tape.bilinear(op, input, weight, bias, autocast=True)


@route(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def conv_transpose(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """``F.conv_transpose1d``, ``F.conv_transpose2d`` and ``F.conv_transpose3d``."""
    _check_batched(tape, input, weight)
    axes = weight.dim() - 2
    stride, padding, dilation = _per_axis(stride, axes), _per_axis(padding, axes), _per_axis(dilation, axes)
    op = Convolution(tuple(weight.shape[2:]), stride, padding, dilation, groups, True, _per_axis(output_padding, axes))
    return tape.bilinear(op, input, weight, bias, autocast=True)


def _per_axis(size: Size, axes: int) -> tuple[int, ...]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * axes if len(sizes) == 1 else sizes


def _check_batched(tape: Tape, input: Tensor, weight: Tensor) -> None:
    if input.dim() != weight.dim():
        raise UnsupportedOperation("a convolution has a rule for inputs with a batch dimension")
    if tape.lineage(input) is not None:
        raise UnsupportedOperation("both operands derive from parameters alone")


def _padded(
    input: Tensor, weight: Tensor, stride: tuple[int, ...], padding: str, dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """The input, with what ``padding="same"`` puts at one end only, and the padding of both ends."""
    if padding == "valid":
        return input, (0,) * len(stride)
    if padding != "same" or any(s != 1 for s in stride):
        raise FastregError(
            f"conv: padding must be 'valid', or 'same' with stride 1, got {padding!r} with stride {stride}"
        )
    reach = [e * (k - 1) for e, k in zip(dilation, weight.shape[2:])]
    if any(r % 2 for r in reach):
        input = F.pad(input, [size for r in reversed(reach) for size in (0, r % 2)])
    return input, tuple(r // 2 for r in reach)
