"""Row normalisation (layer, group, instance and RMS norm without the affine part) to second order.

Three ops share this folder: they are one function and its derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreg.kernels._checks import check_floats, check_rstd, check_shape, check_untracked
from fastreg.kernels._examples import normal
from fastreg.kernels._launch import implementation
from fastreg.kernels._registry import Op
from fastreg.kernels.normalize import native, reference

_SHAPES = ((1, 1), (5, 7), (3, 64), (13, 131), (0, 5))


def examples_forward(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """One column, odd, a whole register and an empty batch, centred and not."""
    draw = normal(dtype, device)
    return [(3 * draw(*shape) + 1, 1e-5, center) for shape in _SHAPES for center in (True, False)]


def examples_backward(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """The forward's examples with one gradient."""
    return [(xhat, rstd, g, center) for xhat, rstd, g, _, center in _differentiated(dtype, device)]


def examples_double(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """The forward's examples with a gradient and a direction."""
    return _differentiated(dtype, device)


def _differentiated(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    draw = normal(dtype, device)
    return [
        (*reference.normalize(x, eps, center), draw(*x.shape), draw(*x.shape), center)
        for x, eps, center in examples_forward(dtype, device)
    ]


FORWARD = Op(
    name="normalize",
    schema="(Tensor x, float eps, bool center) -> (Tensor, Tensor)",
    reference=reference.normalize,
    examples=examples_forward,
    implementations=(implementation("normalize"), native.FORWARD),
)
BACKWARD = Op(
    name="normalize_backward",
    schema="(Tensor xhat, Tensor rstd, Tensor g, bool center) -> Tensor",
    reference=reference.normalize_backward,
    examples=examples_backward,
    implementations=(implementation("normalize", "normalize_backward"), native.BACKWARD),
)
DOUBLE_BACKWARD = Op(
    name="normalize_double_backward",
    schema="(Tensor xhat, Tensor rstd, Tensor g, Tensor v, bool center) -> (Tensor, Tensor)",
    reference=reference.normalize_double_backward,
    examples=examples_double,
    implementations=(implementation("normalize", "normalize_double_backward"), native.DOUBLE_BACKWARD),
)


def normalize(x: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    r"""Normalise each row to unit mean square, after removing its mean with ``center``.

    ``xhat = (x - c mean(x)) rstd``, ``rstd = (mean((x - c mean(x))^2) + eps)^(-1/2)``.

    Args:
        x: [R, N] float; a row is one sample's features, or one sample's group of channels.
        eps: added to the (biased) variance.
        center: True for layer and group norm, False for RMS norm.

    Returns:
        xhat [R, N] in the dtype of ``x``; rstd [R] float32, or float64 for float64.

    Raises:
        FastregError: ``x`` is not a two-dimensional float tensor, or it requires grad.

    Source: Ba et al. 2016, "Layer normalization"; Zhang and Sennrich 2019, "Root mean square layer
    normalization".

    Example:
        >>> import torch
        >>> from fastreg.kernels import normalize
        >>> normalize(torch.tensor([[3.0, 4.0, 3.0, 4.0]]), 0.0, True)
        (tensor([[-1.,  1., -1.,  1.]]), tensor([2.]))
    """
    check_untracked("normalize", x)
    check_floats("normalize", x=x)
    check_shape("normalize", "x", x, "[R, N]", (None, None))
    return FORWARD(x, eps, center)


def normalize_backward(xhat: Tensor, rstd: Tensor, g: Tensor, center: bool) -> Tensor:
    r"""Gradient of :func:`normalize` with respect to x, given that of xhat.

    ``dx = rstd (g - c mean(g) - xhat mean(g xhat))``, row by row.

    Args:
        xhat: [R, N] float, from :func:`normalize`.
        rstd: [R] float32 or float64, from :func:`normalize`.
        g: [R, N] float, dtype of ``xhat``.
        center: as given to :func:`normalize`.

    Returns:
        dx [R, N] in the dtype of ``g``.

    Raises:
        FastregError: shapes or dtypes do not fit, or an input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import normalize, normalize_backward
        >>> xhat, rstd = normalize(torch.randn(2, 8), 1e-5, True)
        >>> normalize_backward(xhat, rstd, torch.ones(2, 8), True).abs().max().item() < 1e-6
        True
    """
    check_untracked("normalize_backward", xhat, rstd, g)
    check_floats("normalize_backward", xhat=xhat, g=g)
    check_shape("normalize_backward", "xhat", xhat, "[R, N]", (None, None))
    check_shape("normalize_backward", "g", g, "[R, N]", xhat.shape)
    check_rstd("normalize_backward", rstd, xhat)
    return BACKWARD(xhat, rstd, g, center)


def normalize_double_backward(
    xhat: Tensor, rstd: Tensor, g: Tensor, v: Tensor, center: bool
) -> tuple[Tensor, Tensor]:
    r"""Gradients of ``<v, normalize_backward(g)>`` with respect to g and to x.

    With ``alpha = mean(g xhat)``, ``beta = mean(v xhat)`` and
    ``kappa = mean(v g) - c mean(v) mean(g) - alpha beta``, row by row:
    ``grad_g = rstd (v - c mean(v) - xhat beta)``;
    ``grad_x = -rstd^2 (beta (g - c mean(g)) + alpha (v - c mean(v)) + xhat (kappa - 2 alpha beta))``.

    Args:
        xhat: [R, N] float, from :func:`normalize`.
        rstd: [R] float32 or float64, from :func:`normalize`.
        g: [R, N] float, the gradient given to :func:`normalize_backward`, dtype of ``xhat``.
        v: [R, N] float, the gradient of its result, dtype of ``xhat``.
        center: as given to :func:`normalize`.

    Returns:
        grad_g [R, N], grad_x [R, N] in the dtype of ``xhat``.

    Raises:
        FastregError: shapes or dtypes do not fit, or an input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import normalize, normalize_double_backward
        >>> xhat, rstd = normalize(torch.randn(2, 8), 1e-5, False)
        >>> grad_g, grad_x = normalize_double_backward(xhat, rstd, xhat, xhat, False)
        >>> grad_g.abs().max().item() < 1e-4
        True
    """
    check_untracked("normalize_double_backward", xhat, rstd, g, v)
    check_floats("normalize_double_backward", xhat=xhat, g=g, v=v)
    check_shape("normalize_double_backward", "xhat", xhat, "[R, N]", (None, None))
    check_shape("normalize_double_backward", "g", g, "[R, N]", xhat.shape)
    check_shape("normalize_double_backward", "v", v, "[R, N]", xhat.shape)
    check_rstd("normalize_double_backward", rstd, xhat)
    return DOUBLE_BACKWARD(xhat, rstd, g, v, center)
