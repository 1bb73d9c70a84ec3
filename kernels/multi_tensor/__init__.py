"""Passes over whole lists of tensors: norms, inner products, perturbations and optimizer steps, one launch each.

A model has hundreds of parameters, most of them small: a launch for each costs more than its work. The steps return
the squared norm of every gradient, which they have read anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.kernels._checks import FLOATS, accumulator, check_shape
from fastreg.kernels._registry import Implementation, chosen
from fastreg.kernels.multi_tensor import compiled, reference

_ALWAYS = Implementation("reference", reference.apply, lambda *_args: None)
IMPLEMENTATIONS = (*compiled.IMPLEMENTATIONS, _ALWAYS)


def multi_sqnorm(xs: Sequence[Tensor]) -> Tensor:
    r"""``out_i = ||x_i||^2`` of every tensor of a list.

    Args:
        xs: n float tensors of one dtype and device, any shapes.

    Returns:
        [n] float32, or float64 for float64.

    Raises:
        FastregError: the list is empty or mixed.

    Example:
        >>> import torch
        >>> from fastreg.kernels import multi_sqnorm
        >>> multi_sqnorm([torch.ones(2, 3), torch.ones(4)])
        tensor([6., 4.])
    """
    return _run("multi_sqnorm", "sqnorm", {"xs": xs}, written=0)


def multi_dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    r"""``out_i = <x_i, y_i>`` of every pair of two lists.

    Args:
        xs: n float tensors of one dtype and device.
        ys: as many, of the same shapes.

    Returns:
        [n] float32, or float64 for float64.

    Raises:
        FastregError: the lists are empty, mixed or do not match.

    Example:
        >>> import torch
        >>> from fastreg.kernels import multi_dot
        >>> multi_dot([torch.ones(3)], [torch.arange(3.0)])
        tensor([3.])
    """
    return _run("multi_dot", "dot", {"xs": xs, "ys": ys}, written=0)


def multi_axpy_(ps: Sequence[Tensor], ds: Sequence[Tensor], coefficients: Tensor) -> None:
    r"""``p_i += c_i d_i`` for every pair of two lists; the coefficients stay on the device.

    Args:
        ps: n float tensors of one dtype and device, overwritten.
        ds: as many, of the same shapes.
        coefficients: [n], or one number for all (0-d), on the device of ``ps``; float32, or float64 for float64.

    Raises:
        FastregError: the lists are empty, mixed or do not match.

    Example:
        >>> import torch
        >>> from fastreg.kernels import multi_axpy_
        >>> p = torch.zeros(2)
        >>> multi_axpy_([p], [torch.ones(2)], torch.tensor(0.5))
        >>> p
        tensor([0.5000, 0.5000])
    """
    _run("multi_axpy_", "axpy", {"ps": ps, "ds": ds}, written=1, coefficients=coefficients)


def sgd_step_(
    ps: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor] | None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
) -> Tensor:
    r"""One step of ``torch.optim.SGD`` on whole lists, and the squared norms of the gradients it read.

    ``d = g + weight_decay p``, ``m = momentum m + (1 - dampening) d`` (``m = d`` in the first step),
    ``p -= lr m``, or ``lr (d + momentum m)`` with ``nesterov``; ``d`` alone without momentum.

    Args:
        ps: n parameters of one dtype and device, overwritten.
        grads: their gradients.
        buffers: momentum buffers, overwritten; finite numbers before the first step. None without momentum.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as ``torch.optim.SGD`` has them.
        first: whether this is the first step of the buffers.

    Returns:
        [n] ``||g_i||^2``, float32, or float64 for float64.

    Raises:
        FastregError: the lists are empty, mixed or do not match; momentum without buffers, or the other way round.

    Example:
        >>> import torch
        >>> from fastreg.kernels import sgd_step_
        >>> p = torch.ones(2)
        >>> sgd_step_([p], [torch.ones(2)], None, lr=0.5), p
        (tensor([2.]), tensor([0.5000, 0.5000]))
    """
    sign = -1.0 if maximize else 1.0
    if (buffers is None) != (momentum == 0):
        have = "none" if buffers is None else "some"
        raise FastregError(
            f"sgd_step_: buffers must be given with momentum and only then, got momentum={momentum} and {have}"
        )
    if buffers is None:
        return _run("sgd_step_", "sgd", {"ps": ps, "grads": grads}, 1, constants=(lr, weight_decay, sign))
    keep, fresh = (0.0, 1.0) if first else (momentum, 1 - dampening)
    mixed = (1.0, momentum) if nesterov else (0.0, 1.0)
    lists = {"ps": ps, "buffers": buffers, "grads": grads}
    return _run("sgd_step_", "sgd_momentum", lists, 2, constants=(lr, weight_decay, sign, keep, fresh, *mixed))


def adamw_step_(
    ps: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> Tensor:
    r"""One step of ``torch.optim.AdamW`` on whole lists, and the squared norms of the gradients it read.

    ``m += (1 - beta1) (g - m)``, ``v = beta2 v + (1 - beta2) g^2``,
    ``p = (1 - lr weight_decay) p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)``.

    Args:
        ps: n parameters of one dtype and device, overwritten.
        grads: their gradients.
        exp_avgs: m, overwritten.
        exp_avg_sqs: v, overwritten.
        step: t, from 1 on.
        lr, betas, eps, weight_decay, maximize: as ``torch.optim.AdamW`` has them.

    Returns:
        [n] ``||g_i||^2``, float32, or float64 for float64.

    Raises:
        FastregError: the lists are empty, mixed or do not match; step is below 1.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.

    Example:
        >>> import torch
        >>> from fastreg.kernels import adamw_step_
        >>> p, m, v = torch.ones(1), torch.zeros(1), torch.zeros(1)
        >>> adamw_step_([p], [torch.ones(1)], [m], [v], 1, lr=0.1, weight_decay=0.0), p
        (tensor([1.]), tensor([0.9000]))
    """
    if step < 1:
        raise FastregError(f"adamw_step_: step must be at least 1, got {step} (count from the first step)")
    rate, root = lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step)
    constants = rate, 1 - lr * weight_decay, -1.0 if maximize else 1.0, *betas, root, eps
    lists = {"ps": ps, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "grads": grads}
    return _run("adamw_step_", "adamw", lists, 3, constants=constants)


@torch.no_grad()
def _run(
    function: str,
    rule: str,
    lists: dict[str, Sequence[Tensor]],
    written: int,
    coefficients: Tensor | None = None,
    constants: tuple[float, ...] = (),
) -> Tensor:
    _check(function, lists)
    args = rule, [list(tensors) for tensors in lists.values()], _per_tensor(function, coefficients, lists), constants
    implementation = chosen(function, IMPLEMENTATIONS, args)
    sums = implementation.fn(*args)
    if implementation is not _ALWAYS:
        # Autograd must see that a tensor it saved has changed; nobody else tells it.
        torch.autograd.graph.increment_version([x for tensors in args[1][:written] for x in tensors])
    return sums


def _per_tensor(function: str, coefficients: Tensor | None, lists: dict[str, Sequence[Tensor]]) -> Tensor | None:
    """Coefficients ``[n]`` in the accumulator's dtype, on the device of the lists."""
    if coefficients is None:
        return None
    firsts = next(iter(lists.values()))
    expected, found = (accumulator(firsts[0].dtype), firsts[0].device), (coefficients.dtype, coefficients.device)
    if found != expected:
        raise FastregError("{}: coefficients must be {} on {}, got {} on {}".format(function, *expected, *found))
    coefficients = coefficients.expand(len(firsts)) if coefficients.dim() == 0 else coefficients
    check_shape(function, "coefficients", coefficients, "[n]", (len(firsts),))
    return coefficients.contiguous()


def _check(function: str, lists: dict[str, Sequence[Tensor]]) -> None:
    """Lists of equal length, of one dtype and device, whose tensors have the shapes of the first list's."""
    (lead, firsts), *_ = lists.items()
    if not firsts:
        raise FastregError(f"{function}: {lead} must hold at least one tensor, got none")
    dtype, device = firsts[0].dtype, firsts[0].device
    # Its memory is a part of it, at no address that a kernel may take for the whole.
    if any(type(tensor).__name__ == "DTensor" for tensors in lists.values() for tensor in tensors):
        raise FastregError(f"{function}: tensors must be whole, got a DTensor (of a sharded model; pass to_local())")
    if dtype not in FLOATS:
        raise FastregError(f"{function}: {lead} must be floating, got {dtype}")
    for name, tensors in lists.items():
        if len(tensors) != len(firsts):
            raise FastregError(f"{function}: {name} must hold {len(firsts)} tensors as {lead}, got {len(tensors)}")
        for place, (tensor, first) in enumerate(zip(tensors, firsts, strict=True)):
            if (tensor.dtype, tensor.device, tensor.shape) != (dtype, device, first.shape):
                raise FastregError(
                    f"{function}: {name}[{place}] must be {dtype} {list(first.shape)} on {device}, got {tensor.dtype} "
                    f"{list(tensor.shape)} on {tensor.device} (one call per dtype and device)"
                )
