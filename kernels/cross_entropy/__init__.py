"""Softmax cross entropy, its gradient and a label drawn from the softmax in one read; its double backward in one pass.

Five ops share this folder: they are one function, its derivatives, and the function fused with its first derivative
for a caller that knows the weight of every row beforehand. Letters: R rows (predictions), C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.kernels._checks import accumulator, check_floats, check_index, check_shape, check_untracked
from fastreg.kernels._launch import implementation
from fastreg.kernels._registry import Op
from fastreg.kernels.cross_entropy import examples, native, reference

_HEAD = "Tensor? labels, Tensor scale, int seed, Tensor draw) -> (Tensor, Tensor, Tensor"

FORWARD = Op(
    name="cross_entropy",
    schema="(Tensor z, Tensor? labels, int seed, Tensor draw) -> (Tensor, Tensor, Tensor)",
    reference=reference.cross_entropy,
    examples=examples.examples_forward,
    implementations=(implementation("cross_entropy"), native.FORWARD),
)
GRADIENT = Op(
    name="cross_entropy_gradient",
    schema=f"(Tensor z, {_HEAD}, Tensor)",
    reference=reference.cross_entropy_gradient,
    examples=examples.examples_gradient,
    implementations=(implementation("cross_entropy", "cross_entropy_gradient"), native.GRADIENT),
)
GRADIENT_IN_PLACE = Op(
    name="cross_entropy_gradient_",
    schema=f"(Tensor(a!) z, {_HEAD})",
    reference=reference.cross_entropy_gradient_,
    examples=examples.examples_gradient,
    implementations=(implementation("cross_entropy", "cross_entropy_gradient_"), native.GRADIENT_IN_PLACE),
)
BACKWARD = Op(
    name="cross_entropy_backward",
    schema="(Tensor z, Tensor lse, Tensor labels, Tensor scale) -> Tensor",
    reference=reference.cross_entropy_backward,
    examples=examples.examples_backward,
    implementations=(implementation("cross_entropy", "cross_entropy_backward"), native.BACKWARD),
)
DOUBLE_BACKWARD = Op(
    name="cross_entropy_double_backward",
    schema="(Tensor z, Tensor lse, Tensor labels, Tensor scale, Tensor v) -> (Tensor, Tensor)",
    reference=reference.cross_entropy_double_backward,
    examples=examples.examples_double,
    implementations=(implementation("cross_entropy", "cross_entropy_double_backward"), native.DOUBLE_BACKWARD),
)


def cross_entropy(z: Tensor, labels: Tensor | None, seed: int, draw: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Cross entropy of every row, and a label drawn from its softmax, in one read of the logits.

    ``loss_r = lse_r - z_{r, y_r}``, ``lse_r = log sum_c exp z_rc``. The drawn label is the first class at which the
    cumulative probability exceeds ``u_r``, 32 random bits that Philox-4x32-10 makes of ``(seed, draw, r)`` alone:
    the same on any device, backend and launch grid, up to rounding of the cumulative sums.

    Args:
        z: [R, C] float logits, C at least 1.
        labels: [R] int64 classes ``y``; rows of -100 are ignored and have loss 0, any other number that names no
            class gives NaN. None takes the drawn labels.
        seed: of the random numbers, 64 bits.
        draw: number of the draw with this seed, 64 bits; another number is an independent draw. A 0-d tensor on the
            CPU, which a traced graph can take as an input, does as well.

    Returns:
        loss [R] and lse [R] float32, or float64 for float64; drawn [R] int64.

    Raises:
        FastregError: shapes or dtypes do not fit, or an input requires grad.

    Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (softmax in one read); Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3" (Philox).

    Example:
        >>> import torch
        >>> from fastreg.kernels import cross_entropy
        >>> loss, lse, drawn = cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]), 0, 0)
        >>> loss
        tensor([1.3863, 0.0000])
    """
    _check("cross_entropy", z, labels)
    return FORWARD(z, labels, seed, torch.as_tensor(draw))


def cross_entropy_gradient(
    z: Tensor, labels: Tensor | None, scale: Tensor, seed: int, draw: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""As :func:`cross_entropy`, with the gradient of ``sum_r scale_r loss_r`` written in the same pass.

    ``dz_rc = scale_r (p_rc - 1[c = y_r])``, ``p_rc = exp(z_rc - lse_r)``. The gradient for the drawn label differs
    from that for the given one by ``scale_r`` in two entries of a row.

    Args:
        z: [R, C] float logits, C at least 1.
        labels: [R] int64, or None, as for :func:`cross_entropy`; the gradient of an ignored row is 0.
        scale: [R] float32, or float64 for float64.
        seed: as for :func:`cross_entropy`.
        draw: as for :func:`cross_entropy`.

    Returns:
        loss, lse and drawn as :func:`cross_entropy`; dz [R, C] in the dtype of ``z``.

    Raises:
        FastregError: shapes or dtypes do not fit, or an input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import cross_entropy_gradient
        >>> *_, dz = cross_entropy_gradient(torch.zeros(1, 4), torch.tensor([1]), torch.ones(1), 0, 0)
        >>> dz
        tensor([[ 0.2500, -0.7500,  0.2500,  0.2500]])
    """
    _check("cross_entropy_gradient", z, labels, scale=scale)
    return GRADIENT(z, labels, scale, seed, torch.as_tensor(draw))


def cross_entropy_gradient_(
    z: Tensor, labels: Tensor | None, scale: Tensor, seed: int, draw: int | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""As :func:`cross_entropy_gradient`, with the gradient written over the logits: ``z`` becomes ``dz``.

    Args:
        z: [R, C] float logits, overwritten.
        labels: [R] int64, or None, as for :func:`cross_entropy`.
        scale: [R] float32, or float64 for float64.
        seed: as for :func:`cross_entropy`.
        draw: as for :func:`cross_entropy`.

    Returns:
        loss, lse and drawn as :func:`cross_entropy`.

    Raises:
        FastregError: shapes or dtypes do not fit, or an input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import cross_entropy_gradient_
        >>> z = torch.zeros(1, 4)
        >>> loss, lse, drawn = cross_entropy_gradient_(z, torch.tensor([1]), torch.ones(1), 0, 0)
        >>> z
        tensor([[ 0.2500, -0.7500,  0.2500,  0.2500]])
    """
    _check("cross_entropy_gradient_", z, labels, scale=scale)
    results = GRADIENT_IN_PLACE(z, labels, scale, seed, torch.as_tensor(draw))
    # Autograd must see that a tensor it saved has changed; below the dispatcher nobody tells it.
    torch.autograd.graph.increment_version(z)
    return results


def cross_entropy_backward(z: Tensor, lse: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    r"""Gradient of ``sum_r scale_r loss_r`` of :func:`cross_entropy` with respect to the logits.

    ``dz_rc = scale_r (p_rc - 1[c = y_r])``, ``p_rc = exp(z_rc - lse_r)``; 0 in ignored rows.

    Args:
        z: [R, C] float logits.
        lse: [R] float32 or float64, from :func:`cross_entropy`.
        labels: [R] int64, the given or the drawn ones.
        scale: [R] dtype of ``lse``, the gradient of the losses.

    Returns:
        dz [R, C] in the dtype of ``z``.

    Raises:
        FastregError: shapes or dtypes do not fit, or an input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import cross_entropy, cross_entropy_backward
        >>> z, one = torch.zeros(1, 4), torch.ones(1)
        >>> _, lse, drawn = cross_entropy(z, None, 0, 0)
        >>> float(cross_entropy_backward(z, lse, drawn, one).sum())
        0.0
    """
    _check("cross_entropy_backward", z, labels, lse=lse, scale=scale)
    return BACKWARD(z, lse, labels, scale)


def cross_entropy_double_backward(
    z: Tensor, lse: Tensor, labels: Tensor, scale: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Gradients of ``<v, cross_entropy_backward(z, scale)>`` with respect to z and to scale.

    ``grad_z = scale_r p_rc (v_rc - <p_r, v_r>)``, the Hessian of the loss times ``v``;
    ``grad_scale = <p_r, v_r> - v_{r, y_r}``. Both are 0 in ignored rows.

    Args:
        z: [R, C] float logits.
        lse: [R] float32 or float64, from :func:`cross_entropy`.
        labels: [R] int64, as given to :func:`cross_entropy_backward`.
        scale: [R] dtype of ``lse``, as given to :func:`cross_entropy_backward`.
        v: [R, C] dtype of ``z``, the gradient of its result.

    Returns:
        grad_z [R, C] in the dtype of ``z``; grad_scale [R] in the dtype of ``lse``.

    Raises:
        FastregError: shapes or dtypes do not fit, or an input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import cross_entropy, cross_entropy_double_backward
        >>> z, one = torch.zeros(1, 4), torch.ones(1)
        >>> _, lse, drawn = cross_entropy(z, None, 0, 0)
        >>> grad_z, grad_scale = cross_entropy_double_backward(z, lse, drawn, one, torch.ones(1, 4))
        >>> float(grad_z.abs().max()), float(grad_scale)
        (0.0, 0.0)
    """
    _check("cross_entropy_double_backward", z, labels, lse=lse, scale=scale)
    check_floats("cross_entropy_double_backward", z=z, v=v)
    check_shape("cross_entropy_double_backward", "v", v, "[R, C]", z.shape)
    check_untracked("cross_entropy_double_backward", v)
    return DOUBLE_BACKWARD(z, lse, labels, scale, v)


def _check(function: str, z: Tensor, labels: Tensor | None, **of_rows: Tensor) -> None:
    """Logits with a class, labels that index them, and numbers per row in the accumulator's dtype."""
    check_untracked(function, z, *of_rows.values())
    check_floats(function, z=z)
    check_shape(function, "z", z, "[R, C]", (None, None))
    if z.shape[1] == 0:
        raise FastregError(f"{function}: z must have at least one class, got {list(z.shape)} (a softmax of none)")
    if labels is not None:
        check_index(function, "labels", labels, z)
        check_shape(function, "labels", labels, "[R]", z.shape[:1])
    for name, values in of_rows.items():
        check_shape(function, name, values, "[R]", z.shape[:1])
        if values.dtype != accumulator(z.dtype):
            raise FastregError(
                f"{function}: {name} must be {accumulator(z.dtype)}, got {values.dtype} (losses are summed so)"
            )
