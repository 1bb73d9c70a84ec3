"""Linear maps: ``F.linear``, ``matmul``, ``mm``, ``addmm`` and ``F.bilinear``-free relatives with one parameter.

Rows of the layer: ``a`` its inputs ``[S, I]``, ``d`` its output gradients ``[S, O]``; ``G_k = sum_s d_s a_s^T`` is
never stored while micro-batches are short (Gram form of Goodfellow 2015, arXiv:1510.01799, for segments of rows).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.errors import UnsupportedOperation
from fastreg.kernels import explain, outer_apply, outer_sqnorm, outer_sum, segment_dot, segment_sum
from fastreg.kernels._checks import accumulator
from fastreg.micro_batches import MicroBatches
from fastreg.rules.bilinear import Bilinear, Parts, Rows
from fastreg.rules.registry import route
from fastreg.rules.tape import Tape


class Linear(Bilinear):
    """``y = x w^T + b`` for ``x [..., I]``, ``w [O, I]``, ``b [O]``."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def forward_onto(self, onto: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
        if onto is None:
            return self.forward(x, weight, None)
        return torch.addmm(rows_of(onto), rows_of(x), weight.t()).view(onto.shape)

    def laid_out(self, d: Tensor) -> Tensor:
        return d.contiguous()

    def transpose(self, d: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return d @ weight

    def outer(self, x: Tensor, d: Tensor, weight: Tensor) -> Tensor:
        return rows_of(d).mT @ rows_of(x)

    def bias_total(self, d: Tensor, bias: Tensor) -> Tensor:
        return rows_of(d).sum(0)

    def bias_dense(self, d: Tensor, bias: Tensor, cut: MicroBatches) -> Tensor:
        rows = rows_of(d)
        return segment_sum(rows, cut.offsets(rows.shape[0])).to(d.dtype)

    def dense(self, x: Tensor, d: Tensor, weight: Tensor, cut: MicroBatches) -> Tensor:
        return cut.fold(lambda a, e: torch.bmm(e.mT, a), rows_of(x), rows_of(d))

    def dense_pull(self, x: Tensor, gradients: Tensor, cut: MicroBatches) -> Tensor:
        out = cut.map(lambda a, g: torch.bmm(a, g.mT), (rows_of(x),), (gradients,))
        return out.view(*x.shape[:-1], out.shape[-1])

    def dense_push(self, d: Tensor, gradients: Tensor, x: Tensor, cut: MicroBatches) -> Tensor:
        return cut.map(torch.bmm, (rows_of(d),), (gradients,)).view(x.shape)

    def forward_each(self, x: Tensor, weights: Tensor, biases: Tensor | None, cut: MicroBatches) -> Tensor:
        if biases is None:
            return self.dense_pull(x, weights, cut)
        out = cut.map(
            lambda a, w, b: torch.baddbmm(b.unsqueeze(1), a, w.mT), (rows_of(x),), (weights, biases)
        )
        return out.view(*x.shape[:-1], out.shape[-1])

    def form(self, x: Tensor, y: Tensor, cut: MicroBatches) -> str:
        if not _quadratic(x, y, cut):
            return "dense"
        a, e = rows_of(x), rows_of(y)
        candidates = explain("outer_apply", a, a, e, cut.offsets(a.shape[0]), False, None, None)
        return f"quadratic ({next(c.name for c in candidates if c.chosen)})"

    def rows(self, x: Tensor, d: Tensor) -> Rows | None:
        return Rows(rows_of(d), rows_of(x))

    def norms(self, x: Tensor, d: Tensor, weight: Tensor, bias: Tensor, parts: Parts, cut: MicroBatches) -> Tensor:
        if not parts.weight:
            return super().norms(x, d, weight, bias, parts, cut)
        a, e = rows_of(x), rows_of(d)
        return outer_sqnorm(a, e, cut.offsets(a.shape[0]), parts.bias)

    def pull(
        self, x: Tensor, d: Tensor, weight: Tensor, bias: Tensor, parts: Parts, cut: MicroBatches
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not parts.weight or not _quadratic(x, d, cut):
            return super().pull(x, d, weight, bias, parts, cut)
        a, e = rows_of(x), rows_of(d)
        offsets = cut.offsets(a.shape[0])
        tangent = outer_apply(a, a, e, offsets, parts.bias)
        # sum_s e_s . tangent_s is ||G_k||^2
        return segment_dot(e, tangent, offsets), tangent.view(d.shape), None

    def scaled_push(
        self, x: Tensor, d: Tensor, memo: Tensor | None, factors: Tensor, cut: MicroBatches
    ) -> Tensor:
        if memo is not None:
            return super().scaled_push(x, d, memo, factors, cut)
        a, e = rows_of(x), rows_of(d)
        factors = factors.to(accumulator(a.dtype))
        return outer_apply(e, e, a, cut.offsets(a.shape[0]), factors=factors).view(x.shape)

    def outer_with_norms(self, x: Tensor, d: Tensor, weight: Tensor, cut: MicroBatches) -> tuple[Tensor, Tensor]:
        a, e = rows_of(x), rows_of(d)
        return outer_sum(a, e, cut.offsets(a.shape[0]))

    def with_norms(
        self, x: Tensor, d: Tensor, weight: Tensor, bias: Tensor, parts: Parts, cut: MicroBatches
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        outputs, inputs = d.shape[-1], x.shape[-1]
        segment = rows_of(x).shape[0] // cut.samples * cut.size
        # Pairs of few rows cost less beside the plain product than the fused product loses to it.
        if not all(parts) or _FUSED_LOSS * segment * (inputs + outputs) > inputs * outputs:
            return super().with_norms(x, d, weight, bias, parts, cut)
        return self.outer(x, d, weight), self.bias_total(d, bias), self.norms(x, d, weight, bias, parts, cut)


def rows_of(x: Tensor) -> Tensor:
    """``[..., N]`` as rows ``[S, N]``."""
    return x.reshape(-1, x.shape[-1])


def _quadratic(x: Tensor, d: Tensor, cut: MicroBatches) -> bool:
    """Counted in multiplications: two Gram forms cost 4 s (I + O) a row, storing G_k and using it twice 6 I O."""
    inputs, outputs = x.shape[-1], d.shape[-1]
    rows = x.numel() // inputs
    segment = rows // cut.samples * cut.size
    return rows * (4 * segment * (inputs + outputs) - 6 * inputs * outputs) < _LAUNCHES


# What the dense form's eight further calls are worth in multiplications: 0.1 ms of two CPU cores.
_LAUNCHES = 10_000_000
# The fused product with norms runs at 0.7 to 0.9 of the plain one, so pairs may cost a fifth of it.
_FUSED_LOSS = 5

LINEAR = Linear()


@route(F.linear)
def linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``."""
    return tape.bilinear(LINEAR, input, weight, bias, autocast=True)


@route(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def matmul(tape: Tape, input: Tensor, other: Tensor) -> Tensor:
    """``x @ w`` with a two-dimensional parameter on the right."""
    if tape.lineage(other) is None or other.dim() != 2:
        raise UnsupportedOperation("only x @ w with a two-dimensional parameter w on the right has a rule")
    return tape.bilinear(LINEAR, input, _transposed(tape, other), None, autocast=True)


@route(torch.addmm, Tensor.addmm)
def addmm(tape: Tape, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``b + x @ w`` with ``b`` of one dimension."""
    if input.dim() != 1 or beta != 1 or alpha != 1:
        raise UnsupportedOperation("addmm has a rule for a one-dimensional input and alpha = beta = 1")
    return tape.bilinear(LINEAR, mat1, _transposed(tape, mat2), input, autocast=True)


def _transposed(tape: Tape, weight: Tensor) -> Tensor:
    """``w.t()``, with its lineage if ``w`` is tracked."""
    lineage = tape.lineage(weight)
    out = weight.t()
    return out if lineage is None else tape.derive(out, lineage, lambda p: p.t(), isometric=True)
