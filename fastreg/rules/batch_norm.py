"""Batch norm: ``F.batch_norm`` with the statistics of each micro-batch, or with running ones.

In training mode a batch norm layer couples the samples it sees. Training on the micro-batches one by one couples those
of one micro-batch; so does the rule (ghost batch norm, Hoffer et al. 2017, arXiv:1705.08741).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.micro_batches import MicroBatches
from fastreg.normalize import normalize_micro_batches
from fastreg.rules.affine import Scale, affine, differentiated, refuse_parameter, tap_affine
from fastreg.rules.registry import route
from fastreg.rules.tape import Tape


@route(F.batch_norm, always=True)
def batch_norm(
    tape: Tape,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm``; in training mode running statistics take one step per micro-batch, in order."""
    scale = Scale(input.dim() - 2)
    if not training:
        plain = partial(F.batch_norm, input, running_mean, running_var, weight, bias, False, momentum, eps)
        if not differentiated(tape, input, weight, bias):
            return plain()
        assert running_mean is not None and running_var is not None
        standard = partial(standardize, mean=running_mean, var=running_var, eps=eps)
        if tape.session.beside:
            return tap_affine(tape, plain(), input, weight, bias, scale, standard)
        return affine(tape, standard(input), weight, bias, scale)
    refuse_parameter(tape, input)
    if tape.session.beside:
        raise FastregError(
            "batch_norm: a monitored layer must not couple the samples of a batch, got one in training mode (choose "
            "micro_batch_size=None, which takes every backward pass for a micro-batch, or use GroupNorm)"
        )
    cut = tape.session.micro_batches
    values = _values_per_channel(cut, input)
    xhat, mean, var = normalize_micro_batches(input, cut, eps)
    if running_mean is not None and running_var is not None:
        unbiased = var * (values / (values - 1)).unsqueeze(1)
        update_running(running_mean, running_var, (mean, unbiased), momentum)
    return affine(tape, xhat, weight, bias, scale)


@route(torch.batch_norm, always=True)
def torch_batch_norm(
    tape: Tape,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """``torch.batch_norm``: the arguments of ``F.batch_norm`` in another order."""
    return batch_norm(tape, input, running_mean, running_var, weight, bias, training, momentum, eps)


def standardize(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` by channel (dimension 1) for statistics that are constants."""
    channels = (-1, *(1,) * (x.dim() - 2))
    rstd = (var + eps).rsqrt()
    return torch.addcmul((-mean * rstd).view(channels), x, rstd.view(channels)).to(x.dtype)


@torch.no_grad()
def update_running(mean: Tensor, var: Tensor, steps: tuple[Tensor, Tensor], momentum: float) -> None:
    """Take one step of the running statistics ``[C]`` per micro-batch, towards ``steps [m, C]``, in place.

    ``r <- (1 - a)^m r + sum_k a (1 - a)^(m - 1 - k) s_k``, which is ``m`` steps ``r <- (1 - a) r + a s_k``. A forward
    that is re-run inside a backward (checkpointing) takes none.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    count = steps[0].shape[0]
    ages = torch.arange(count - 1, -1, -1, device=mean.device, dtype=mean.dtype)
    weights = momentum * (1 - momentum) ** ages
    for running, step in zip((mean, var), steps):
        running.mul_((1 - momentum) ** count).add_(weights @ step.to(running.dtype))


def _values_per_channel(cut: MicroBatches, x: Tensor) -> Tensor:
    """Values each micro-batch has per channel, ``[m]``.

    Raises:
        FastregError: a micro-batch has one: its variance is zero.
    """
    per_sample = x.numel() // x.shape[1] // cut.samples
    if min(cut.size, cut.tail or cut.size) * per_sample == 1:
        raise FastregError(
            "batch_norm: every micro-batch must have more than 1 value per channel when training, got "
            f"micro_batch_size={cut.size} with a last micro-batch of {cut.tail or cut.size} and input shape "
            f"{tuple(x.shape)} (choose a micro_batch_size that leaves no single sample, put the layer in eval mode, or "
            "use GroupNorm)"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return cut.sizes(x.device, dtype) * per_sample
