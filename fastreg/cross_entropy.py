r"""Softmax cross entropy that is differentiable twice, for given labels and for labels drawn from the softmax.

Per row of logits ``z``, with ``p = softmax(z)``, a label ``y`` and the gradient ``s`` of the row's loss:

    forward          loss = log sum_c exp z_c - z_y
    backward         dz = s (p - onehot(y))
    double backward  (given v, the gradient of dz)  grad_z = s p (v - <p, v>),  grad_s = <p, v> - v_y

The forward reads the logits once and keeps one number per row; each backward reads them once more. No probabilities
are stored: the caller holds the logits anyway.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg import kernels
from fastreg.kernels._checks import accumulator


def cross_entropy(z: Tensor, labels: Tensor) -> Tensor:
    r"""``loss_r = -log softmax(z_r)[labels_r]``, one per row and unscaled; differentiable twice.

    Args:
        z: [R, C] float logits.
        labels: [R] int64 classes; rows of -100 have loss and gradient 0.

    Returns:
        [R] float32, or float64 for float64 logits.

    Raises:
        FastregError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from fastreg.cross_entropy import cross_entropy
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
        tensor([1.3863, 0.0000])
    """
    if peek_interpreter_stack() is not None:
        return _composed(z, labels)
    loss, _ = CrossEntropy.apply(z, labels, 0, 0)
    return loss


def drawn_cross_entropy(z: Tensor, seed: int, draw: int | Tensor) -> tuple[Tensor, Tensor]:
    r"""``loss_r = -log softmax(z_r)[y_r]`` for labels ``y_r ~ softmax(z_r)``, held fixed under differentiation.

    Args:
        z: [R, C] float logits.
        seed: of the draw, 64 bits.
        draw: number of the draw with this seed, an integer or a 0-d tensor on the CPU: the labels are a function of
            the logits, ``seed`` and ``draw``.

    Returns:
        loss [R] float32, or float64 for float64 logits, differentiable twice; labels [R] int64.

    Raises:
        FastregError: shapes or dtypes do not fit.

    Source: Novack et al. 2022, arXiv:2211.15853 (labels drawn from the model, held fixed).

    Example:
        >>> import torch
        >>> from fastreg.cross_entropy import drawn_cross_entropy
        >>> drawn_cross_entropy(torch.tensor([[0.0, 99.0]]), 0, 0)
        (tensor([0.]), tensor([1]))
    """
    if peek_interpreter_stack() is not None:
        _, _, labels = kernels.cross_entropy(z.detach(), None, seed, draw)
        return _composed(z, labels), labels
    return CrossEntropy.apply(z, None, seed, draw)


def _composed(z: Tensor, labels: Tensor) -> Tensor:
    """The loss in functions that torch's function transforms can differentiate."""
    return F.cross_entropy(z.to(accumulator(z.dtype)), labels, reduction="none")


class CrossEntropy(Function):
    """``z -> loss, labels``, the labels drawn if none are given."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, labels: Tensor | None, seed: int, draw: int | Tensor) -> tuple[Tensor, Tensor]:
        loss, lse, drawn = kernels.cross_entropy(z, labels, seed, draw)
        labels = drawn if labels is None else labels
        ctx.mark_non_differentiable(drawn)
        ctx.save_for_backward(z, lse, labels)
        return loss, drawn

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _of_labels: Tensor) -> tuple[Tensor | None, ...]:
        return CrossEntropyBackward.apply(*ctx.saved_tensors, scale), None, None, None


class CrossEntropyBackward(Function):
    """``z, scale -> scale (softmax(z) - onehot(labels))``, differentiable once more by hand."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, lse: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(z, lse, labels, scale)
        return kernels.cross_entropy_backward(z, lse, labels, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        z, lse, labels, scale = ctx.saved_tensors
        grad_z, grad_scale = kernels.cross_entropy_double_backward(z, lse, labels, scale, v)
        return grad_z, None, None, grad_scale
