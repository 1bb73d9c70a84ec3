"""The bilinear map of elementwise parameters: a scale, a bias, or both.

``G_k[c] = sum_{s in k, p} d[s,c,p] x[s,c,p]`` is as small as the parameter, so it is formed for every micro-batch in
one read of ``x`` and ``d``, and used in place of a Gram form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fastreg.errors import UnsupportedOperation
from fastreg.kernels import affine_sqnorm
from fastreg.micro_batches import MicroBatches, times
from fastreg.rules.bilinear import Bilinear, Parts, sum_squares
from fastreg.rules.tape import Tape

# Parts of a sum over all rows that may run in parallel; more would cost more to add up than they save.
_SLABS = 16


@dataclass(frozen=True, slots=True)
class Scale(Bilinear):
    """``y = x * w + b``, ``x [n, ...]`` in the shape and dtype of ``y``; ``w`` and ``b`` broadcast, either may miss.

    Attributes:
        trailing: dimensions of ``x`` behind those of ``w`` and ``b``: 0 for parameters of the last dimensions (layer
            norm, broadcasting), the number of spatial dimensions for parameters of the channels.
    """

    trailing: int = 0

    def aligned(self, parameter: Tensor) -> Tensor:
        """The parameter as it broadcasts against ``x``."""
        return parameter.reshape(*parameter.shape, *(1,) * self.trailing) if self.trailing else parameter

    def bias_view(self, bias: Tensor, y: Tensor) -> tuple[int, ...]:
        shape = (*bias.shape, *(1,) * self.trailing)
        return shape[1:] if len(shape) == y.dim() else shape

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is None:
            # A tangent is accumulated onto by the caller, so it must not be the incoming one.
            return x.clone() if bias is None else (x + self.aligned(bias)).to(x.dtype)
        if bias is None:
            return (x * self.aligned(weight)).to(x.dtype)
        return torch.addcmul(self.aligned(bias), x, self.aligned(weight)).to(x.dtype)

    def transpose(self, d: Tensor, weight: Tensor | None, x: Tensor) -> Tensor:
        return d if weight is None else (d * self.aligned(weight)).to(d.dtype)

    def outer(self, x: Tensor, d: Tensor, weight: Tensor) -> Tensor:
        places = _places(self.bias_view(weight, x), tuple(x.shape[1:]))
        if places is None:
            return (x * d).sum_to_size(self.bias_view(weight, x)).reshape(weight.shape)
        x, d = x.reshape(-1, *places), d.reshape(-1, *places)
        _, _, of_weight, _ = affine_sqnorm(x, d, _slabs(x.shape[0]))
        return of_weight.sum(0).view(weight.shape)

    def dense(self, x: Tensor, d: Tensor, weight: Tensor, cut: MicroBatches) -> Tensor:
        return self._gradients(x, d, weight, cut)[0]

    def dense_pull(self, x: Tensor, gradients: Tensor, cut: MicroBatches) -> Tensor:
        spread = self._per_segment(gradients, x)
        return cut.map(lambda rows, g: rows * g, (x,), (spread,))

    def dense_push(self, d: Tensor, gradients: Tensor, x: Tensor, cut: MicroBatches) -> Tensor:
        return self.dense_pull(d, gradients, cut)

    def forward_each(self, x: Tensor, weights: Tensor, biases: Tensor | None, cut: MicroBatches) -> Tensor:
        if biases is None:
            return self.dense_pull(x, weights, cut)
        spread = self._per_segment(weights, x), self._per_segment(biases, x)
        return cut.map(lambda rows, w, b: torch.addcmul(b, rows, w), (x,), spread)

    def norms(self, x: Tensor, d: Tensor, weight: Tensor, bias: Tensor, parts: Parts, cut: MicroBatches) -> Tensor:
        if not parts.weight:
            return Bilinear.norms(self, x, d, weight, bias, parts, cut)
        places = _places(self.bias_view(weight, x), tuple(x.shape[1:]))
        if places is not None and (not parts.bias or bias.shape == weight.shape):
            x, d = x.reshape(-1, *places), d.reshape(-1, *places)
            squared, of_bias, _, _ = affine_sqnorm(x, d, cut.offsets(x.shape[0]))
            return squared + of_bias if parts.bias else squared
        of_weight, known = self._gradients(x, d, weight, cut)
        squared = sum_squares(of_weight)
        return squared + sum_squares(self._bias_gradients(d, bias, known, cut)) if parts.bias else squared

    def pull(
        self, x: Tensor, d: Tensor, weight: Tensor, bias: Tensor, parts: Parts, cut: MicroBatches
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not parts.weight:
            return Bilinear.pull(self, x, d, weight, bias, parts, cut)
        of_weight, of_bias = self._gradients(x, d, weight, cut)
        if not parts.bias:
            return sum_squares(of_weight), self.dense_pull(x, of_weight, cut), of_weight.unsqueeze(0)
        if of_bias is not None and of_bias.shape[1:] == bias.shape:
            # The gradients are small: keep both, and form the tangent with its factors when it is asked for.
            return sum_squares(of_weight) + sum_squares(of_bias), None, torch.stack((of_weight, of_bias))
        of_bias = self.bias_dense(d, bias, cut)
        spread = self._per_segment(of_weight, x), self._per_segment(of_bias, x)
        tangent = cut.map(lambda rows, g, h: torch.addcmul(h, rows, g), (x,), spread)
        return sum_squares(of_weight) + sum_squares(of_bias), tangent, of_weight.unsqueeze(0)

    def scaled_pull(
        self, onto: Tensor | None, x: Tensor, tangent: Tensor | None, memo: Tensor, factors: Tensor, cut: MicroBatches
    ) -> Tensor:
        if tangent is not None:
            return Bilinear.scaled_pull(self, onto, x, tangent, memo, factors, cut)
        of_weight, of_bias = (self._per_segment(g, x) for g in _scaled(memo, factors).unbind())
        if onto is None:
            return cut.map(lambda rows, g, h: torch.addcmul(h, rows, g), (x,), (of_weight, of_bias))
        return cut.map(lambda o, rows, g, h: o.addcmul_(rows, g).add_(h), (onto, x), (of_weight, of_bias))

    def scaled_push(self, x: Tensor, d: Tensor, memo: Tensor, factors: Tensor, cut: MicroBatches) -> Tensor:
        return self.dense_push(d, _scaled(memo[:1], factors)[0], x, cut)

    def _per_segment(self, gradients: Tensor, rows: Tensor) -> Tensor:
        """``[m, *w.shape]`` so that it broadcasts against rows cut into ``[m, n / m, ...]``."""
        shape = (*gradients.shape[1:], *(1,) * self.trailing)
        padded = (1,) * (rows.dim() - len(shape)) + shape
        return gradients.reshape(gradients.shape[0], *padded).to(rows.dtype)

    def _bias_gradients(self, d: Tensor, bias: Tensor, known: Tensor | None, cut: MicroBatches) -> Tensor:
        """``known``, formed along with the weight's gradients, if the bias has the weight's shape."""
        if known is not None and known.shape[1:] == bias.shape:
            return known
        return self.bias_dense(d, bias, cut)

    def _gradients(self, x: Tensor, d: Tensor, weight: Tensor, cut: MicroBatches) -> tuple[Tensor, Tensor | None]:
        """Per micro-batch gradients ``[m, *w.shape]`` of the weight, and of a bias of its shape if they come free."""
        view = self.bias_view(weight, x)
        places = _places(view, tuple(x.shape[1:]))
        if places is None:
            return cut.reduce(x * d, view).reshape(cut.count, *weight.shape), None
        x, d = x.reshape(-1, *places), d.reshape(-1, *places)
        _, _, of_weight, of_bias = affine_sqnorm(x, d, cut.offsets(x.shape[0]))
        shape = (cut.count, *weight.shape)
        return of_weight.view(shape), of_bias.view(shape)


def _scaled(gradients: Tensor, factors: Tensor) -> Tensor:
    """``[parts, m, ...]`` times ``factors [m]``."""
    return times(gradients.transpose(0, 1), factors).transpose(0, 1)


def _places(view: tuple[int, ...], row: tuple[int, ...]) -> tuple[int, int] | None:
    """``(C, P)`` if a parameter that broadcasts as ``view`` has C entries and each meets P places in sequence.

    None if it does not see the dimensions of a row as (outer, C, P), as ``[T, 1, D]`` does not.
    """
    padded = (1,) * (len(row) - len(view)) + view
    own = [i for i, size in enumerate(padded) if size != 1]
    if not own:
        return 1, prod(row)
    first, last = own[0], own[-1] + 1
    if padded[first:last] != row[first:last]:
        return None
    return prod(row[first:last]), prod(row[last:])


def _slabs(rows: int) -> tuple[int, ...]:
    """Offsets of a few slabs of rows, so that one sum over all rows has parts to run in parallel."""
    return (*range(0, rows, -(-rows // _SLABS)), rows)


def refuse_parameter(tape: Tape, x: Tensor) -> None:
    """Raise UnsupportedOperation if the input of a norm layer derives from parameters alone."""
    if tape.lineage(x) is not None:
        raise UnsupportedOperation("a norm of a parameter is not linear in it; give the norm layer data")


def differentiated(tape: Tape, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a norm layer has anything to differentiate.

    Raises:
        UnsupportedOperation: ``x`` derives from parameters alone.
    """
    refuse_parameter(tape, x)
    return x.requires_grad or tape.lineage(weight) is not None or tape.lineage(bias) is not None


def affine(tape: Tape, xhat: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Scale) -> Tensor:
    """``xhat * w + b`` for the parameters there are, recorded if one of them is tracked."""
    if weight is None and bias is None:
        return xhat
    if tape.lineage(weight) is None and tape.lineage(bias) is None:
        return scale.forward(xhat, weight, bias)
    return tape.bilinear(scale, xhat, weight, bias)


def tap_affine(
    tape: Tape,
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Scale,
    normalized: Callable[[Tensor], Tensor],
) -> Tensor:
    """``y = normalized(x) * w + b`` as torch computed it, tapped if a parameter of it is tracked."""
    if tape.lineage(weight) is None and tape.lineage(bias) is None:
        return y
    return tape.tap(tape.use(scale, x, weight, bias), y, x, weight, bias, normalized)
