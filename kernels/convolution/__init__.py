"""Convolutions whose weights, or whose weight gradients, differ between segments of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.kernels._checks import check_floats, check_shape, check_untracked
from fastreg.kernels._examples import normal
from fastreg.kernels._launch import implementation
from fastreg.kernels._registry import Op
from fastreg.kernels.convolution import reference

# m, b, C, O, image, kernel, stride, padding, dilation: sizes of one, borders that no window reaches, windows that see
# padding alone, sizes past a block.
_SIZES = (
    (1, 1, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 3, 3, 5, (5, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 1, 2, 3, (7, 6), (2, 3), (2, 3), (1, 0), (1, 1)),
    (2, 2, 4, 1, (3, 7), (3, 2), (1, 2), (4, 1), (2, 3)),
    (1, 2, 5, 2, (1, 9), (1, 5), (1, 1), (0, 4), (1, 2)),
    (1, 2, 17, 65, (6, 6), (2, 2), (1, 1), (1, 0), (1, 1)),
)


def examples_outer(dtype: torch.dtype, device: str) -> list[tuple[object, ...]]:
    """Every geometry, and segments without samples."""
    draw = normal(dtype, device)
    found = [
        (draw(m, b, channels, *image), draw(m, b, outputs, *places(image, kernel, *geometry)),
         list(kernel), *map(list, geometry))
        for m, b, channels, outputs, image, kernel, *geometry in _SIZES
    ]  # fmt: skip
    return [*found, (draw(2, 0, 3, 4, 4), draw(2, 0, 5, 2, 2), [3, 3], [1, 1], [0, 0], [1, 1])]


def examples_apply(dtype: torch.dtype, device: str) -> list[tuple[object, ...]]:
    """Every geometry, with biases and without."""
    draw = normal(dtype, device)
    return [
        (draw(m, b, channels, *image), draw(m, outputs, channels, *kernel),
         draw(m, outputs) if number % 2 else None, *map(list, geometry))
        for number, (m, b, channels, outputs, image, kernel, *geometry) in enumerate(_SIZES)
    ]  # fmt: skip


def places(image: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
           dilation: Sequence[int]) -> list[int]:  # fmt: skip
    """``[P, Q]``: how often a window fits."""
    axes = zip(image, kernel, stride, padding, dilation, strict=True)
    return [(size + 2 * pad - apart * (taps - 1) - 1) // step + 1 for size, taps, step, pad, apart in axes]


OUTER = Op(
    name="conv_outer",
    schema="(Tensor x, Tensor d, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation) -> Tensor",
    reference=reference.conv_outer,
    examples=examples_outer,
    implementations=(implementation("convolution", "conv_outer"),),
)
APPLY = Op(
    name="conv_apply",
    schema="(Tensor x, Tensor weights, Tensor? biases, int[2] stride, int[2] padding, int[2] dilation) -> Tensor",
    reference=reference.conv_apply,
    examples=examples_apply,
    implementations=(implementation("convolution", "conv_apply"),),
)


def conv_outer(
    x: Tensor,
    d: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    r"""The weight gradient of every segment of a batch of images.

    ``G_k[o, c, i, j] = sum_{n, p, q} d_k[n, o, p, q] x_k[n, c, stride p + dilation i - padding, ...]``. Unscaled.

    Args:
        x: [m, b, C, H, W] float, the images of m segments; read fastest with channels last in memory.
        d: [m, b, O, P, Q] float, output gradients, dtype of ``x``.
        kernel, stride, padding, dilation: two integers each, as of ``torch.nn.functional.conv2d``.

    Returns:
        [m, O, C, *kernel] in the dtype of ``x``.

    Raises:
        FastregError: shapes, dtypes or geometry do not fit, or an input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import conv_outer
        >>> x, d = torch.ones(2, 1, 1, 2, 2), torch.ones(2, 1, 1, 2, 2)
        >>> conv_outer(x, d, [1, 1], [1, 1], [0, 0], [1, 1]).flatten()
        tensor([4., 4.])
    """
    check_untracked("conv_outer", x, d)
    check_floats("conv_outer", x=x, d=d)
    check_shape("conv_outer", "x", x, "[m, b, C, H, W]", (None,) * 5)
    expected = _expected("conv_outer", x, kernel, stride, padding, dilation)
    check_shape("conv_outer", "d", d, "[m, b, O, P, Q]", (*x.shape[:2], None, *expected))
    return OUTER(x, d, kernel, stride, padding, dilation)


def conv_apply(
    x: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    r"""A convolution with weights of its own for every segment of a batch of images.

    ``y_k = conv2d(x_k, weights_k, biases_k)``.

    Args:
        x: [m, b, C, H, W] float, the images of m segments; read fastest with channels last in memory.
        weights: [m, O, C, kh, kw], dtype of ``x``.
        biases: [m, O], dtype of ``x``, or None.
        stride, padding, dilation: two integers each, as of ``torch.nn.functional.conv2d``.

    Returns:
        [m, b, O, P, Q] in the dtype of ``x``.

    Raises:
        FastregError: shapes, dtypes or geometry do not fit, or an input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import conv_apply
        >>> weights = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1)
        >>> conv_apply(torch.ones(2, 1, 1, 1, 2), weights, None, [1, 1], [0, 0], [1, 1]).flatten()
        tensor([1., 1., 2., 2.])
    """
    given = {"x": x, "weights": weights} | ({} if biases is None else {"biases": biases})
    check_untracked("conv_apply", *given.values())
    check_floats("conv_apply", **given)
    check_shape("conv_apply", "x", x, "[m, b, C, H, W]", (None,) * 5)
    check_shape("conv_apply", "weights", weights, "[m, O, C, kh, kw]", (x.shape[0], None, x.shape[2], None, None))
    if biases is not None:
        check_shape("conv_apply", "biases", biases, "[m, O]", weights.shape[:2])
    _expected("conv_apply", x, weights.shape[3:], stride, padding, dilation)
    return APPLY(x, weights, biases, stride, padding, dilation)


def _expected(function: str, x: Tensor, *geometry: Sequence[int]) -> list[int]:
    """``[P, Q]`` of a geometry that fits the images."""
    names = ("kernel", "stride", "padding", "dilation")
    for name, pair in zip(names, geometry, strict=True):
        least = 0 if name == "padding" else 1
        if len(pair) != 2 or min(pair) < least:
            raise FastregError(f"{function}: {name} must be two integers >= {least}, got {tuple(pair)}")
    found = places(x.shape[3:], *geometry)
    if min(found) < 1:
        raise FastregError(
            f"{function}: the window must fit the padded image at least once, got kernel {tuple(geometry[0])} and "
            f"dilation {tuple(geometry[3])} for images {tuple(x.shape[3:])} with padding {tuple(geometry[2])}"
        )
    return found
