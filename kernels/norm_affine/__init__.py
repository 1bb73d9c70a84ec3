"""Layer, group, instance and RMS norm together with their scale and bias, to second order.

Three ops share this folder: they are one function and its derivatives. Letters: S samples (rows of a layer norm), C
channels in G groups, P places; the ``C / G * P`` numbers of one group of one sample are normalised together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.kernels._checks import accumulator, check_floats, check_offsets, check_shape, check_untracked
from fastreg.kernels._examples import OFFSETS, normal
from fastreg.kernels._launch import implementation
from fastreg.kernels._registry import Op
from fastreg.kernels.norm_affine import native, reference

# (C, P, groups): layer norm of few and of many features, group norm, instance norm.
_SHAPES = ((3, 1, 1), (19, 1, 1), (12, 9, 3), (4, 33, 4))
_EPS = 1e-5


def examples_forward(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """Every shape with and without a bias, centred and not; no samples."""
    draw = normal(dtype, device)
    return [
        (3 * draw(samples, c, p) + 1, draw(c), draw(c) if center else None, groups, _EPS, center)
        for samples in (5, 0)
        for c, p, groups in _SHAPES
        for center in (True, False)
    ]


def examples_backward(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """Every segmentation of every shape, centred and not."""
    draw = normal(dtype, device)
    return [
        (*_saved(3 * draw(rows, c, p) + 1, draw(c), groups, center), draw(rows, c, p), [*offsets, rows], center)
        for *offsets, rows in OFFSETS
        for c, p, groups in _SHAPES
        for center in (True, False)
    ]


def examples_double(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """The backward's examples with a gradient for each of its results."""
    draw, wide = normal(dtype, device), normal(accumulator(dtype), device)
    return [
        (*args[:5], draw(*args[4].shape), *(wide(len(args[5]) - 1, args[4].shape[1]) for _ in range(2)), *args[5:])
        for args in examples_backward(dtype, device)
    ]


def _saved(x: Tensor, weight: Tensor, groups: int, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, mean, rstd = reference.norm_affine(x, weight, None, groups, _EPS, center)
    return x, mean, rstd, weight


FORWARD = Op(
    name="norm_affine",
    schema="(Tensor x, Tensor weight, Tensor? bias, int groups, float eps, bool center) -> (Tensor, Tensor, Tensor)",
    reference=reference.norm_affine,
    examples=examples_forward,
    implementations=(implementation("norm_affine"), native.FORWARD),
)
BACKWARD = Op(
    name="norm_affine_backward",
    schema="(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor d, int[] offsets, bool center) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.norm_affine_backward,
    examples=examples_backward,
    implementations=(implementation("norm_affine", "norm_affine_backward"), native.BACKWARD),
)
DOUBLE_BACKWARD = Op(
    name="norm_affine_double_backward",
    schema="(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor d, Tensor v, Tensor v_scale, Tensor v_bias, "
    "int[] offsets, bool center) -> (Tensor, Tensor, Tensor)",
    reference=reference.norm_affine_double_backward,
    examples=examples_double,
    implementations=(implementation("norm_affine", "norm_affine_double_backward"), native.DOUBLE_BACKWARD),
)


def norm_affine(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Normalise the numbers of each group of channels of each sample, then scale and shift channel by channel.

    ``y = weight xhat + bias``, ``xhat = (x - c mean(x)) rstd``, ``rstd = (mean((x - c mean(x))^2) + eps)^(-1/2)``.

    Args:
        x: [S, C, P] float. Layer norm: C features, P = 1, one group.
        weight: [C] float, dtype of ``x``.
        bias: [C] float, dtype of ``x``, or None.
        groups: G, a divisor of C.
        eps: added to the (biased) variance.
        center: False for RMS norm.

    Returns:
        y [S, C, P] in the dtype of ``x``; mean (zero unless ``center``) and rstd [S, G], float32, or float64 for
        float64.

    Raises:
        FastregError: shapes or dtypes do not fit, or an input requires grad.

    Source: Ba et al. 2016, arXiv:1607.06450; Wu and He 2018, arXiv:1803.08494; Zhang and Sennrich 2019,
    arXiv:1910.07467.

    Example:
        >>> import torch
        >>> from fastreg.kernels import norm_affine
        >>> y, mean, rstd = norm_affine(torch.tensor([[[3.0], [5.0]]]), torch.ones(2), None, 1, 0.0, True)
        >>> y.flatten(), mean.item(), rstd.item()
        (tensor([-1.,  1.]), 4.0, 1.0)
    """
    check_untracked("norm_affine", x, weight, *(() if bias is None else (bias,)))
    check_floats("norm_affine", x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    check_shape("norm_affine", "x", x, "[S, C, P]", (None, None, None))
    check_shape("norm_affine", "weight", weight, "[C]", x.shape[1:2])
    if bias is not None:
        check_shape("norm_affine", "bias", bias, "[C]", x.shape[1:2])
    if groups < 1 or x.shape[1] % groups:
        raise FastregError(
            f"norm_affine: groups must be a divisor of C = {x.shape[1]}, got {groups} (a group is C / groups channels)"
        )
    return FORWARD(x, weight, bias, groups, eps, center)


def norm_affine_backward(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, d: Tensor, offsets: Sequence[int], center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Input gradient of :func:`norm_affine`, and the gradients of scale and bias per segment of samples.

    ``dx = J (weight d)``, ``scale_k[c] = sum_{s in k, p} d xhat``, ``bias_k[c] = sum_{s in k, p} d``, with
    ``J g = rstd (g - c mean(g) - xhat mean(g xhat))`` over the numbers normalised together. Unscaled.

    Args:
        x: [S, C, P] float, as given to :func:`norm_affine`.
        mean, rstd: [S, G] float32 or float64, from :func:`norm_affine`.
        weight: [C] float, dtype of ``x``.
        d: [S, C, P] float, output gradients, dtype of ``x``.
        offsets: m + 1 ascending sample numbers from 0 to S; segments may be empty.
        center: as given to :func:`norm_affine`.

    Returns:
        dx [S, C, P] in the dtype of ``x``; scale [m, C] and bias [m, C], float32, or float64 for float64.

    Raises:
        FastregError: shapes, dtypes or offsets do not fit, or an input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import norm_affine, norm_affine_backward
        >>> x, ones = torch.tensor([[[3.0], [5.0]]]), torch.ones(2)
        >>> _, mean, rstd = norm_affine(x, ones, None, 1, 0.0, True)
        >>> norm_affine_backward(x, mean, rstd, ones, torch.ones(1, 2, 1), [0, 1], True)[1]
        tensor([[-1.,  1.]])
    """
    _check("norm_affine_backward", x, mean, rstd, weight, offsets, d=d)
    return BACKWARD(x, mean, rstd, weight, d, offsets, center)


def norm_affine_double_backward(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    d: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_bias: Tensor,
    offsets: Sequence[int],
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Double backward: gradients of a linear function of what :func:`norm_affine_backward` returns.

    ``L = <v, dx> + sum_k <v_scale_k, scale_k> + <v_bias_k, bias_k>``. With ``g = weight d``, ``alpha = mean(g xhat)``,
    ``beta = mean(v xhat)`` and ``kappa = mean(v g) - c mean(v) mean(g) - alpha beta``:
    ``grad_d = weight J v + v_scale_k xhat + v_bias_k``; ``grad_weight = sum d J v``;
    ``grad_x = -rstd^2 (beta (g - c mean(g)) + alpha (v - c mean(v)) + xhat (kappa - 2 alpha beta)) + J (v_scale_k d)``.

    Args:
        x, mean, rstd, weight, d, offsets, center: as given to :func:`norm_affine_backward`.
        v: [S, C, P] float, the gradient of dx, dtype of ``x``.
        v_scale, v_bias: [m, C] float32, or float64 for float64, the gradients of its other results.

    Returns:
        grad_d, grad_x [S, C, P], grad_weight [C] in the dtype of ``x``.

    Raises:
        FastregError: shapes, dtypes or offsets do not fit, or an input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import norm_affine, norm_affine_double_backward
        >>> x, ones, zeros = torch.tensor([[[3.0], [5.0]]]), torch.ones(2), torch.zeros(1, 2)
        >>> _, mean, rstd = norm_affine(x, ones, None, 1, 0.0, True)
        >>> norm_affine_double_backward(x, mean, rstd, ones, x, 0 * x, zeros, zeros + 2, [0, 1], True)[0].flatten()
        tensor([2., 2.])
    """
    name = "norm_affine_double_backward"
    _check(name, x, mean, rstd, weight, offsets, d=d, v=v)
    check_untracked(name, v_scale, v_bias)
    check_floats(name, rstd=rstd, v_scale=v_scale, v_bias=v_bias)
    check_shape(name, "v_scale", v_scale, "[m, C]", (len(offsets) - 1, x.shape[1]))
    check_shape(name, "v_bias", v_bias, "[m, C]", v_scale.shape)
    return DOUBLE_BACKWARD(x, mean, rstd, weight, d, v, v_scale, v_bias, offsets, center)


def _check(
    name: str, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, offsets: Sequence[int], **like_x: Tensor
) -> None:
    """What the two derivatives ask of the arguments they share."""
    check_untracked(name, x, mean, rstd, weight, *like_x.values())
    check_floats(name, x=x, weight=weight, **like_x)
    check_shape(name, "x", x, "[S, C, P]", (None, None, None))
    check_shape(name, "weight", weight, "[C]", x.shape[1:2])
    for argument, tensor in like_x.items():
        check_shape(name, argument, tensor, "[S, C, P]", x.shape)
    check_shape(name, "rstd", rstd, "[S, G]", (x.shape[0], None))
    check_shape(name, "mean", mean, "[S, G]", rstd.shape)
    if {mean.dtype, rstd.dtype} != {accumulator(x.dtype)}:
        raise FastregError(
            f"{name}: mean and rstd must be {accumulator(x.dtype)}, got {mean.dtype} and {rstd.dtype} "
            "(norm_affine returns them so)"
        )
    check_offsets(name, offsets, x.shape[0])
