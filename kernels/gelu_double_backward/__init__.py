"""Double backward of GELU in one elementwise pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreg.kernels._checks import check_floats, check_shape, check_untracked
from fastreg.kernels._examples import normal
from fastreg.kernels._launch import implementation
from fastreg.kernels._registry import Op
from fastreg.kernels.gelu_double_backward import native, reference


def examples(dtype: torch.dtype, device: str) -> list[tuple[object, ...]]:
    """Any shape, both forms, with arguments far into both tails."""
    draw = normal(dtype, device)
    shapes = ((1,), (7, 3), (2, 5, 131), (0, 4))
    return [
        (4 * draw(*shape), draw(*shape), draw(*shape), approximate)
        for shape in shapes
        for approximate in (False, True)
    ]


OP = Op(
    name="gelu_double_backward",
    schema="(Tensor x, Tensor d, Tensor v, bool approximate) -> (Tensor, Tensor)",
    reference=reference.gelu_double_backward,
    examples=examples,
    implementations=(implementation("gelu_double_backward"), native.IMPLEMENTATION),
)


def gelu_double_backward(x: Tensor, d: Tensor, v: Tensor, approximate: bool) -> tuple[Tensor, Tensor]:
    r"""Gradients of ``<v, d gelu'(x)>`` with respect to d and to x.

    ``grad_d = v gelu'(x)``, ``grad_x = v d gelu''(x)``, with ``gelu(x) = x Phi(x)``, or its tanh
    approximation ``x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2``.

    Args:
        x: any shape, float, the input of the activation.
        d: float, shape and dtype of ``x``, the gradient of its output.
        v: float, shape and dtype of ``x``, the gradient of the backward's result.
        approximate: True for the tanh form.

    Returns:
        grad_d, grad_x in the shape and dtype of ``x``.

    Raises:
        FastregError: shapes or dtypes differ, or an input requires grad.

    Source: Hendrycks and Gimpel 2016, "Gaussian error linear units".

    Example:
        >>> import torch
        >>> from fastreg.kernels import gelu_double_backward
        >>> one = torch.ones(1)
        >>> gelu_double_backward(torch.zeros(1), one, one, False)
        (tensor([0.5000]), tensor([0.7979]))
    """
    check_untracked("gelu_double_backward", x, d, v)
    check_floats("gelu_double_backward", x=x, d=d, v=v)
    check_shape("gelu_double_backward", "d", d, "the shape of x", x.shape)
    check_shape("gelu_double_backward", "v", v, "the shape of x", x.shape)
    return OP(x, d, v, approximate)
