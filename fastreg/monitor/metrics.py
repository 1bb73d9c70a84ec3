"""What a monitor can measure: one function each. To add one, write it and enter it in ``METRICS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """One measured step; fields ``[L]`` by layer, or 0-d for all layers together.

    Attributes:
        small: mean squared norm of the micro-batches' gradients.
        big: squared norm of the batch's gradient.
        trace, signal: averages over steps of unbiased estimates of ``tr S`` and ``||G||^2`` (see ``noise``).
        norms: norms of the micro-batches' gradients of this rank, ``[m]``, in the order of the batch.
        fisher: this step's estimate of the Fisher trace, if it was asked for.
    """

    small: Tensor
    big: Tensor
    trace: Tensor
    signal: Tensor
    norms: Tensor
    fisher: Tensor | None


@dataclass(frozen=True)
class Metric:
    """A metric and what it takes.

    Attributes:
        value: 0-d, or by layer; ``[m]`` for norms.
        about: formula and unit, in words.
        layered: whether there is one for every layer.
        aligned: whether it has an entry for every micro-batch, so that all must be measured.
        samples: whether micro-batches must be single samples.
        fisher: whether it needs labels drawn from the model.
        noise: whether it needs two micro-batches a step, to tell noise from signal.
    """

    value: Callable[[Measured], Tensor]
    about: str
    layered: bool = False
    aligned: bool = False
    samples: bool = False
    fisher: bool = False
    noise: bool = False


def _fisher(m: Measured) -> Tensor:
    assert m.fisher is not None  # asked for by name
    return m.fisher


METRICS = {
    "grad_noise_scale": Metric(
        lambda m: m.trace / m.signal,
        "tr S / ||G||^2, samples: a batch of this size averages half the noise out",
        layered=True,
        noise=True,
    ),
    "noise_trace": Metric(lambda m: m.trace, "tr S, the trace of the per-sample gradient covariance", True, noise=True),
    "grad_norm": Metric(lambda m: m.big.sqrt(), "||g||, norm of the batch's mean gradient", True),
    "micro_batch_grad_norm": Metric(
        lambda m: m.small.sqrt(), "root mean square over micro-batches of ||g_k||", True
    ),
    "sample_norms": Metric(
        lambda m: m.norms, "||g_i|| of every sample, in the order of the batch", aligned=True, samples=True
    ),
    "micro_batch_norms": Metric(lambda m: m.norms, "||g_k|| of every micro-batch", aligned=True),
    "empirical_fisher_trace": Metric(
        lambda m: m.small, "mean ||g_i||^2, the Fisher trace with the batch's own labels", True, samples=True
    ),
    "fisher_trace": Metric(
        _fisher, "tr F with labels drawn from the model; one more pass of input gradients", fisher=True
    ),
}
DEFAULT = ("grad_noise_scale", "noise_trace", "grad_norm")
