"""From the gradient rows of the loss that was passed to the gradients of each micro-batch's own mean loss.

The rows that autograd delivers for micro-batch ``k`` sum to ``r_k g_k``, where ``g_k`` is the gradient of the mean
loss of ``k``'s own samples and ``r_k`` is known from how the loss was reduced. Squared norms scale with ``r_k^2``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.micro_batches import MicroBatches
from fastreg.peek import holds

REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True, slots=True)
class Reduction:
    """How the samples' losses became the loss that was passed.

    Attributes:
        kind: ``"mean"``: ``sum_i l_i / B`` (with counts ``sum_i l_i / sum_i n_i``); ``"sum"``: ``sum_i l_i``.
        scale: what the loss was multiplied by afterwards.
        counts: ``n_i``, ``[B]``: tokens (or weights) of each sample, for losses averaged over tokens.
    """

    kind: str = "mean"
    scale: float = 1.0
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in REDUCTIONS:
            raise FastregError(f"reg: reduction must be one of {REDUCTIONS}, got {self.kind!r}")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not self.scale > 0:
            raise FastregError(f"reg: scale must be a positive number, got {self.scale!r}")

    def total(self, cut: MicroBatches, like: Tensor) -> Tensor | float:
        """``r``: the loss that was passed is r times the mean loss C of the batch."""
        if self.kind == "mean":
            return self.scale
        return self.scale * (cut.samples if self.counts is None else self.sizes(cut, like).sum())

    def shares(self, cut: MicroBatches, like: Tensor) -> Tensor:
        """``w_k``, ``[m]``, with ``C = sum_k w_k C_k``."""
        sizes = cut.sizes(like.device, like.dtype) if self.counts is None else self.sizes(cut, like)
        return sizes / sizes.sum()

    def factors(self, cut: MicroBatches, like: Tensor) -> Tensor:
        """``1 / r_k^2``, ``[m]``; 0 for a micro-batch without counts, whose rows are all zero."""
        if self.counts is None:
            return _factors_of_sizes(cut.samples, cut.size, self.kind, self.scale, like.device, like.dtype)
        return _factors(self.sizes(cut, like), self.kind, self.scale)

    def sizes(self, cut: MicroBatches, like: Tensor) -> Tensor:
        """Counts of each micro-batch, ``[m]``."""
        if not isinstance(self.counts, Tensor) or self.counts.shape != (cut.samples,):
            got = tuple(self.counts.shape) if isinstance(self.counts, Tensor) else self.counts
            raise FastregError(f"reg: counts must be a tensor of shape ({cut.samples},), one per sample, got {got}")
        return cut.reduce(self.counts.to(like.device, like.dtype), ())


def _factors(sizes: Tensor, kind: str, scale: float) -> Tensor:
    share = sizes / sizes.sum() if kind == "mean" else sizes
    return (torch.where(share > 0, 1 / share, 0) / scale).square()


@lru_cache(maxsize=64)
def _factors_of_sizes(
    samples: int, size: int, kind: str, scale: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    return _factors(MicroBatches(samples, size).sizes(device, dtype), kind, scale)


def check_loss(loss: object, samples: int) -> None:
    """Refuse a loss that cannot be regularized.

    The test for NaN reads the value where that is free (on the CPU).
    """
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        got = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
        raise FastregError(f"reg: loss must be a floating point tensor (or a callable that returns one), got {got}")
    if loss.dim() and loss.shape != (samples,):
        raise FastregError(
            f"reg: loss must be a scalar or have one entry per sample, shape ({samples},), got {tuple(loss.shape)} "
            "(reduce token losses over tokens first)"
        )
    if not loss.requires_grad:
        raise FastregError(
            "reg: loss must require grad, got one that does not (was it detached, or computed under no_grad?)"
        )
    if loss.device.type == "cpu" and holds(torch.isnan(loss).any()):
        raise FastregError("reg: loss must be a number, got NaN (lower the learning rate or look at the inputs)")


def tensors_in(values: object) -> Iterator[Tensor]:
    """Every tensor of nested tuples, lists and mappings, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple, Mapping)):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from tensors_in(value)


def first_tensor(outputs: object) -> Tensor | None:
    """The logits of a model's outputs: a tensor, the field ``logits``, or the first tensor of a tuple or mapping."""
    if isinstance(outputs, Tensor) or outputs is None:
        return outputs
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    return next((tensor for tensor in tensors_in(outputs) if tensor.is_floating_point() and tensor.dim()), None)
