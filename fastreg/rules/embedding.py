"""Embeddings: ``F.embedding`` and ``torch.embedding``.

An index with samples is data: row ``s`` of the gradient of micro-batch ``k`` is the sum of the ``d`` that share its
index, found by sorting, so that no ``[m, V, D]`` table is stored. An index without samples (positions, say) selects
rows of the parameter: the result derives from it and is tracked further.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.errors import UnsupportedOperation
from fastreg.kernels import index_sqnorm
from fastreg.micro_batches import MicroBatches
from fastreg.peek import holds
from fastreg.rules.bilinear import Bilinear, Parts, Rows
from fastreg.rules.registry import route
from fastreg.rules.tape import Tape


class Embedding(Bilinear):
    """``y = w[x]`` for indices ``x [n, ...]`` and ``w [V, D]``; linear in the one-hot rows that ``x`` stands for."""

    def forward(self, x: Tensor, weight: Tensor, bias: None) -> Tensor:
        return F.embedding(x, weight)

    def transpose(self, d: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        raise TypeError("an index has no gradient")

    def outer(self, x: Tensor, d: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten.embedding_dense_backward(d, x, weight.shape[0], -1, False)

    def dense(self, x: Tensor, d: Tensor, weight: Tensor, cut: MicroBatches) -> Tensor:
        entries, width = weight.shape
        table = d.new_zeros(cut.count * entries, width)
        table.index_add_(0, _table_rows(x, entries, cut), d.reshape(-1, width))
        return table.view(cut.count, entries, width)

    def dense_pull(self, x: Tensor, gradients: Tensor, cut: MicroBatches) -> Tensor:
        picked = gradients.flatten(0, 1)[_table_rows(x, gradients.shape[1], cut)]
        return picked.view(*x.shape, gradients.shape[2])

    def dense_push(self, d: Tensor, gradients: Tensor, x: Tensor, cut: MicroBatches) -> Tensor:
        raise TypeError("an index has no gradient")

    def norms(self, x: Tensor, d: Tensor, weight: Tensor, bias: None, parts: Parts, cut: MicroBatches) -> Tensor:
        return self.pull(x, d, weight, bias, parts, cut)[0]

    def pull(
        self, x: Tensor, d: Tensor, weight: Tensor, bias: None, parts: Parts, cut: MicroBatches
    ) -> tuple[Tensor, Tensor, None]:
        squared, shared = index_sqnorm(x.flatten(), d.reshape(-1, d.shape[-1]), cut.offsets(x.numel()))
        return squared, shared.view(d.shape), None

    def outer_with_norms(self, x: Tensor, d: Tensor, weight: Tensor, cut: MicroBatches) -> tuple[Tensor, Tensor]:
        return self.outer(x, d, weight), self.norms(x, d, weight, None, Parts(True, False), cut)

    def form(self, x: Tensor, y: Tensor, cut: MicroBatches) -> str:
        return "index"

    def rows(self, x: Tensor, d: Tensor) -> Rows:
        return Rows(x.flatten(), d.reshape(-1, d.shape[-1]))


EMBEDDING = Embedding()


def _table_rows(x: Tensor, entries: int, cut: MicroBatches) -> Tensor:
    """``[S]``: the row of each position in ``m`` tables of ``entries`` rows, one below the other."""
    flat = x.flatten()
    segment = flat.numel() // cut.samples * cut.size
    return torch.arange(flat.numel(), device=x.device).div_(segment, rounding_mode="floor") * entries + flat


@route(F.embedding)
def embedding(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``F.embedding``."""
    if max_norm is not None:
        raise UnsupportedOperation("max_norm rescales the parameter in the forward; clip it in the training loop")
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return torch_embedding(tape, weight, input, padding, scale_grad_by_freq, sparse)


@route(torch.embedding)
def torch_embedding(
    tape: Tape,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``torch.embedding``."""
    if scale_grad_by_freq:
        raise UnsupportedOperation("scale_grad_by_freq=True is no gradient of a loss; use scale_grad_by_freq=False")
    if sparse:
        raise UnsupportedOperation("sparse=True gives a sparse gradient; use sparse=False")
    lineage = tape.lineage(weight)
    if lineage is None:
        raise UnsupportedOperation("only the embedding weight may be a parameter")
    padding = (indices == padding_idx).unsqueeze(-1) if padding_idx >= 0 else None
    if not _has_samples(indices, tape.samples):
        out = torch.embedding(weight, indices, padding_idx)
        return tape.derive(out, lineage, lambda p: _masked(F.embedding(indices, p), padding), isometric=False)
    out = tape.bilinear(EMBEDDING, indices, weight)
    # The padding row is read, and no gradient of any order comes back from it.
    return out if padding is None else torch.where(padding, out.detach(), out)


@route(F.embedding_bag, torch.embedding_bag)
def embedding_bag(tape: Tape, *args: object, **kwargs: object) -> Tensor:
    """``F.embedding_bag``: torch has no double backward for it."""
    raise UnsupportedOperation("embedding_bag has no double backward; use embedding, and a sum or mean over the bag")


def _masked(rows: Tensor, padding: Tensor | None) -> Tensor:
    return rows if padding is None else rows.masked_fill(padding, 0)


def _has_samples(indices: Tensor, samples: int) -> bool:
    """Whether dimension 0 of an index holds the samples of the batch.

    A one-dimensional ``0, 1, ..., B - 1`` is read as positions, which sequence models look up for every sample alike.
    """
    if indices.dim() == 0 or indices.shape[0] != samples:
        return False
    return indices.dim() > 1 or not holds((indices == torch.arange(samples, device=indices.device)).all())
