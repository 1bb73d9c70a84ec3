"""Norms within one sample: ``F.layer_norm``, ``F.rms_norm``, ``F.group_norm``, ``F.instance_norm``.

With a tracked scale each is one operation (:mod:`fastreg.rules.norm_affine`), otherwise a normalisation without
parameters (:mod:`fastreg.normalize`) followed by what scale and bias there are. They are routed without parameters
too: torch's double backward of a norm layer is a composite that costs several times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.errors import UnsupportedOperation
from fastreg.rules.affine import Scale, affine, differentiated, refuse_parameter, tap_affine
from fastreg.rules.batch_norm import standardize, update_running
from fastreg.rules.norm_affine import Norm, fits, norm_affine_layer
from fastreg.rules.registry import route
from fastreg.rules.tape import Tape


@route(F.layer_norm, torch.layer_norm, always=True, second_order=True)
def layer_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """``F.layer_norm``."""
    plain = partial(F.layer_norm, input, normalized_shape, weight, bias, eps)
    if not differentiated(tape, input, weight, bias):
        return plain()
    x = _autocast_float(input)
    norm = Norm(_width(x, normalized_shape), 1, 1, eps, center=True)
    return _normalized_affine(tape, norm, x, weight, bias, plain)


@route(F.rms_norm, torch.rms_norm, always=True, second_order=True)
def rms_norm(
    tape: Tape, input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``F.rms_norm``."""
    plain = partial(F.rms_norm, input, normalized_shape, weight, eps)
    if not differentiated(tape, input, weight, None):
        return plain()
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    norm = Norm(_width(input, normalized_shape), 1, 1, eps, center=False)
    return _normalized_affine(tape, norm, input, weight, None, plain)


@route(F.group_norm, torch.group_norm, always=True, second_order=True)
def group_norm(
    tape: Tape,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """``F.group_norm``."""
    plain = partial(F.group_norm, input, num_groups, weight, bias, eps)
    if not differentiated(tape, input, weight, bias):
        return plain()
    x = _autocast_float(input)
    norm = Norm(x.shape[1], prod(x.shape[2:]), num_groups, eps, center=True, trailing=x.dim() - 2)
    return _normalized_affine(tape, norm, x, weight, bias, plain)


@route(F.instance_norm, always=True)
def instance_norm(
    tape: Tape,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.instance_norm``; running statistics take one step per micro-batch."""
    refuse_parameter(tape, input)
    trailing = input.dim() - 2
    plain = partial(
        F.instance_norm, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )
    if not use_input_stats:
        assert running_mean is not None and running_var is not None
        standard = partial(standardize, mean=running_mean, var=running_var, eps=eps)
        if tape.session.beside:
            return tap_affine(tape, plain(), input, weight, bias, Scale(trailing), standard)
        return affine(tape, standard(input), weight, bias, Scale(trailing))
    if running_mean is not None and running_var is not None and not tape.session.beside:
        update_running(running_mean, running_var, _instance_statistics(tape, input), momentum)
    norm = Norm(input.shape[1], prod(input.shape[2:]), input.shape[1], eps, center=True, trailing=trailing)
    return _normalized_affine(tape, norm, input, weight, bias, plain)


@route(torch.instance_norm, always=True)
def torch_instance_norm(
    tape: Tape,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """``torch.instance_norm``: the arguments of ``F.instance_norm`` in another order."""
    return instance_norm(tape, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _normalized_affine(
    tape: Tape, norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None, plain: Callable[[], Tensor]
) -> Tensor:
    """The layer, of which ``plain`` is torch's own form."""
    if tape.session.beside:
        return tap_affine(tape, plain(), x, weight, bias, Scale(norm.trailing), norm.normalized)
    if weight is not None and fits(tape, x, weight, bias):
        return norm_affine_layer(tape, norm, x, weight, bias)
    return affine(tape, norm.normalized(x), weight, bias, Scale(norm.trailing))


@torch.no_grad()
def _instance_statistics(tape: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the instances ``[m, C]``, averaged over the samples of each micro-batch."""
    cut = tape.session.micro_batches
    var, mean = torch.var_mean(x.flatten(2), 2)
    average = partial(cut.fold, lambda rows: rows.mean(1))
    return average(mean), average(var)


def _width(x: Tensor, normalized_shape: list[int]) -> int:
    """Entries normalised together.

    Raises:
        UnsupportedOperation: the shape takes in the batch dimension.
    """
    shape = tuple(normalized_shape)
    if len(shape) >= x.dim() or tuple(x.shape[-len(shape) :]) != shape:
        raise UnsupportedOperation(
            f"normalized_shape must be the last dimensions of the input without its batch dimension, got {shape} "
            f"for {tuple(x.shape)}"
        )
    return prod(shape)


def _autocast_float(x: Tensor) -> Tensor:
    """``x`` in float32 where CUDA autocast runs norm layers so."""
    return x.float() if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype.itemsize < 4 else x
