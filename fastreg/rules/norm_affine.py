"""Layer, group, instance and RMS norm with their scale and bias as one operation to second order.

With ``xhat`` the normalised input, ``J = d xhat / d x`` and ``d`` the gradient of the loss with respect to
``y = w xhat + b``:

    backward         dx = J (w d),  G_k = sum d xhat,  H_k = sum d over the rows of micro-batch k;
                     dw = sum_k G_k,  db = sum_k H_k,  sq_k = ||G_k||^2 + ||H_k||^2
    double backward  (given vx, vw, vb, vsq)  that of  <vx, J (w d)> + sum_k <2 vsq_k G_k + vw, G_k>
                                                                    + <2 vsq_k H_k + vb, H_k>

Each pass reads a tensor once (see :func:`fastreg.kernels.norm_affine_double_backward`). The input itself is saved, not
xhat: that spares a write, and leads the double backward's gradient to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.kernels import has_fast_form, norm_affine, norm_affine_backward, norm_affine_double_backward
from fastreg.micro_batches import Selection
from fastreg.normalize import normalize_rows
from fastreg.rules.affine import Scale
from fastreg.rules.bilinear import Parts, sum_squares
from fastreg.rules.routing import Wanted, deposit_shared, takes_norms, wanted_by
from fastreg.rules.tape import Tape
from fastreg.rules.use import Use
from fastreg.session import Phase


@dataclass(frozen=True, slots=True)
class Norm:
    """Which numbers are normalised together.

    Attributes:
        channels: C, entries of the scale and of the bias.
        places: P, numbers of one sample that meet each of them.
        groups: channels are normalised together by groups of ``C / groups``.
        eps: added to the (biased) variance.
        center: False for RMS norm.
        trailing: dimensions of the input behind those of the scale.
    """

    channels: int
    places: int
    groups: int
    eps: float
    center: bool
    trailing: int = 0

    def rows(self, x: Tensor) -> Tensor:
        """``x`` as ``[S, C, P]``."""
        return x.reshape(-1, self.channels, self.places)

    def normalized(self, x: Tensor) -> Tensor:
        """xhat, in the shape of ``x``; differentiable twice."""
        return normalize_rows(x, self.channels // self.groups * self.places, self.eps, self.center)


def fits(tape: Tape, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the fused form serves these operands: a tracked scale, and one dtype that compiled code takes."""
    if tape.session.perturbation is not None or tape.session.leaves is not None:
        return False
    present = [p for p in (weight, bias) if p is not None]
    tracked = weight is not None and all(tape.lineage(p) is not None for p in present)
    return tracked and all(p.dtype == x.dtype for p in present) and has_fast_form("norm_affine", x)


def norm_affine_layer(tape: Tape, norm: Norm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``weight xhat + bias`` for operands that :func:`fits`, recorded.

    Raises:
        FastregError: ``x`` does not keep its samples along dimension 0.
    """
    use = tape.use(Scale(norm.trailing), x, weight, bias)
    tape.note(use, "NormAffine", lambda: "dense")
    # Three passes read x; a strided one is copied once.
    return NormAffine.apply(norm, use, x.contiguous(), weight, bias, tape.root)


class NormAffine(Function):
    """``y = w xhat + b`` whose backward returns squared micro-batch norms as the gradient of the probe."""

    @staticmethod
    def forward(
        ctx: Any, norm: Norm, use: Use, x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor
    ) -> Tensor:
        ctx.norm, ctx.use = norm, use
        ctx.set_materialize_grads(False)
        shift = None if bias is None else bias.flatten()
        y, mean, rstd = norm_affine(norm.rows(x), weight.flatten(), shift, norm.groups, norm.eps, norm.center)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, d: Tensor | None) -> tuple[Tensor | None, ...]:
        if d is None:
            return (None,) * 6
        norm, use, (x, weight, bias, mean, rstd) = ctx.norm, ctx.use, ctx.saved_tensors
        wanted = wanted_by(ctx, use, ctx.needs_input_grad[1:])
        if takes_norms(ctx, use) and use.shared:
            deposit_shared(use, norm.normalized(x), d, weight, bias)
        return None, None, *NormAffineBackward.apply(norm, use, wanted, d, x, weight, bias, mean, rstd)


class NormAffineBackward(Function):
    """The backward of :class:`NormAffine`, differentiable once more by hand."""

    @staticmethod
    def forward(
        ctx: Any,
        norm: Norm,
        use: Use,
        wanted: Wanted,
        d: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
    ) -> tuple[Tensor | None, ...]:
        session = use.session
        ctx.set_materialize_grads(False)
        ctx.norm, ctx.norms = norm, wanted.norms
        ctx.pick = pick = session.pick()
        d, x, mean, rstd = (pick.take(rows) for rows in (d.contiguous(), x, mean, rstd))
        # Without norms the sums over all rows are enough.
        ctx.offsets = pick.kept.offsets(mean.shape[0]) if any(wanted.norms) else (0, mean.shape[0])
        dx, of_weight, of_bias = norm_affine_backward(
            norm.rows(x), mean, rstd, weight.flatten(), norm.rows(d), ctx.offsets, norm.center
        )
        ctx.save_for_backward(d, x, weight, mean, rstd, of_weight, of_bias)
        squared = _squared_norms(use, wanted, of_weight, of_bias, pick)
        if session.phase is Phase.DIRECTIONS and any(wanted.norms):
            squared = _directions(use, wanted.norms, weight, of_weight, bias, of_bias)
        put = pick.put(dx.view(x.shape)) if wanted.dx else None
        dw = of_weight.sum(0).view(weight.shape) if wanted.dw else None
        db = of_bias.sum(0).view(bias.shape) if bias is not None and wanted.db else None
        return put, dw, db, squared

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None, vsq: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        d, x, weight, mean, rstd, of_weight, of_bias = ctx.saved_tensors
        norm, norms, pick = ctx.norm, ctx.norms, ctx.pick
        factors = None if vsq is None else 2 * pick.take_segments(vsq)
        v = torch.zeros_like(d) if vx is None else pick.take(vx)
        grad_d, grad_x, grad_weight = norm_affine_double_backward(
            norm.rows(x), mean, rstd, weight.flatten(), norm.rows(d), norm.rows(v),
            _cotangent(of_weight, factors if norms.weight else None, vw),
            _cotangent(of_bias, factors if norms.bias else None, vb),
            ctx.offsets, norm.center,
        )  # fmt: skip
        of_d, of_x = (pick.put(rows.view(x.shape)) for rows in (grad_d, grad_x))
        return None, None, None, of_d, of_x, grad_weight.view(weight.shape), None, None, None


def _directions(
    use: Use, parts: Parts, weight: Tensor, of_weight: Tensor, bias: Tensor | None, of_bias: Tensor
) -> Tensor:
    """Leave the gradients of the parameters that this use makes up alone with the session; their squared norms."""
    kept = use.session.directions
    assert kept is not None
    scales = of_weight.view(-1, *weight.shape).to(weight.dtype) if parts.weight else None
    shifts = of_bias.view(-1, *bias.shape).to(bias.dtype) if bias is not None and parts.bias else None
    squared = kept.keep_dense(use, weight, scales, bias, shifts)
    return squared.to(use.session.probe.dtype)


def _squared_norms(use: Use, wanted: Wanted, of_weight: Tensor, of_bias: Tensor, pick: Selection) -> Tensor | None:
    """Squared norms ``[m]`` of the parameters that this use makes up alone, noted for each if asked for."""
    total = None
    for lineage, asked, gradients in (
        (use.weight, wanted.norms.weight, of_weight),
        (use.bias, wanted.norms.bias, of_bias),
    ):
        if lineage is not None and asked:
            squared = use.session.for_probe(pick, sum_squares(gradients))
            use.session.add_norms(lineage.key, squared)
            total = squared if total is None else total + squared
    return total


def _cotangent(gradients: Tensor, factors: Tensor | None, v: Tensor | None) -> Tensor:
    """What multiplies the gradients ``[m, C]`` in the function to differentiate: ``factors_k * gradients + v``."""
    scaled = torch.zeros_like(gradients) if factors is None else gradients * factors.to(gradients.dtype).unsqueeze(1)
    return scaled if v is None else scaled + v.flatten()
