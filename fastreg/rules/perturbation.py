"""Weights that differ between micro-batches: ``w + c_k G_k``, in one batch and without a second derivative.

The first pass of a perturbed step keeps, operation by operation, what the gradients ``G_k`` of the micro-batches are
made of: a :class:`Direction`. Its squared norms are the gradient of the probe, as always; from them follow the factors
``c_k``. In the second pass every operation runs at the weights of each micro-batch, by functions of first order:

    forward    y = B(x_k, w + c_k G_k) + b + c_k H_k
    backward   dx = B^T(d_k, w + c_k G_k),  dw = outer(x, d),  db = sum d

Foret et al. 2021 (arXiv:2010.01412, section 4.1) run one micro-batch after another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.errors import FastregError
from fastreg.kernels import index_sqnorm, outer_apply
from fastreg.micro_batches import MicroBatches, aligned
from fastreg.rules.bilinear import MaybeTensor, Parts, Rows, sum_squares
from fastreg.rules.use import Lineage, Use


class Direction(ABC):
    """The gradients of one operation's parameters in every micro-batch, in the form that its products need."""

    @abstractmethod
    def forward(self, use: Use, factors: Tensor, x: Tensor, weight: MaybeTensor, bias: MaybeTensor) -> Tensor:
        """``B(x_k, w + c_k G_k) + b + c_k H_k``."""

    @abstractmethod
    def transpose(self, use: Use, factors: Tensor, d: Tensor, weight: MaybeTensor, x: Tensor) -> Tensor:
        """``B^T(d_k, w + c_k G_k)``; of ``x`` only the shape is read."""


class DenseDirection(Direction):
    """Gradients ``[m, *w.shape]`` and ``[m, *b.shape]``, None for a parameter that is not perturbed.

    They are turned into perturbed parameters when they are first met: then one product serves ``w`` and ``G_k``.

    Args:
        used_up: whether the perturbed weights may take the place of the gradients, which saves their memory.
    """

    def __init__(self, of_weight: Tensor | None, of_bias: Tensor | None, used_up: bool = False) -> None:
        self.of_weight, self.of_bias, self.used_up = of_weight, of_bias, used_up
        self._weights: Tensor | None = None
        self._factors: Tensor | None = None

    def forward(self, use: Use, factors: Tensor, x: Tensor, weight: MaybeTensor, bias: MaybeTensor) -> Tensor:
        op, cut = use.op, use.session.micro_batches
        biases = bias
        if bias is not None:
            biases = bias.expand(cut.count, *bias.shape)
            biases = biases if self.of_bias is None else perturbed(bias, self.of_bias, factors)
        if self.of_weight is None:
            return op.with_biases(op.forward(x, weight, None), biases, cut)
        weights = self._perturbed_weights(weight, factors)
        if cut.count == 1:
            return op.forward(x, weights[0], None if biases is None else biases[0])
        return op.forward_each(x, weights, biases, cut)

    def transpose(self, use: Use, factors: Tensor, d: Tensor, weight: MaybeTensor, x: Tensor) -> Tensor:
        cut = use.session.micro_batches
        if self.of_weight is None:
            return use.op.transpose(d, weight, x)
        weights = self._perturbed_weights(weight, factors)
        return use.op.transpose(d, weights[0], x) if cut.count == 1 else use.op.dense_push(d, weights, x, cut)

    def _perturbed_weights(self, weight: Tensor, factors: Tensor) -> Tensor:
        if self._weights is None or self._factors is not factors:
            assert self.of_weight is not None
            out = self.of_weight if self.used_up and self.of_weight.dtype == weight.dtype else None
            self._weights, self._factors = perturbed(weight, self.of_weight, factors, out), factors
        return self._weights


class RowDirection(Direction):
    """The rows of ``G_k = sum_s left_s right_s^T``; with ``bias``, ``H_k = sum_s left_s`` as well."""

    def __init__(self, rows: Rows, bias: bool) -> None:
        self.rows, self.bias = rows, bias

    def forward(self, use: Use, factors: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = use.op.forward(x, weight, bias)
        return _add_products(use, factors, y, x, self.rows.right, self.rows.left, self.bias)

    def transpose(self, use: Use, factors: Tensor, d: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        dx = use.op.transpose(d, weight, x)
        return _add_products(use, factors, dx, d, self.rows.left, self.rows.right, False)


class IndexDirection(Direction):
    """The gradient of a table that a gather read, at the entries it read.

    Args:
        index: what was looked up.
        shared: ``[*index.shape, D]``: at each place, row ``index`` of ``G_k``.
    """

    def __init__(self, index: Tensor, shared: Tensor) -> None:
        self.index, self.shared = index, shared

    def forward(self, use: Use, factors: Tensor, x: Tensor, weight: Tensor, bias: None) -> Tensor:
        if x.data_ptr() != self.index.data_ptr() and not torch.equal(x, self.index):
            raise FastregError(
                "perturbation: both passes of a step must look up the same indices, got others in the second (draw "
                "random indices from torch's generators, which are set back, or outside the closure)"
            )
        return use.session.micro_batches.scaled(self.shared, factors, use.op.forward(x, weight, bias))

    def transpose(self, use: Use, factors: Tensor, d: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return use.op.transpose(d, weight, x)


def keep_direction(
    use: Use, parts: Parts, x: Tensor, d: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Leave the direction of an operation with its session; the squared norms ``[m]`` of the ``parts`` asked for."""
    op, cut, kept = use.op, use.session.micro_batches, use.session.directions
    assert kept is not None
    whole = parts.weight and parts.bias == (bias is not None) and not kept.adaptive
    rows = op.rows(x, d) if whole else None
    if rows is not None and not rows.left.is_floating_point():
        squared, shared = index_sqnorm(rows.left, rows.right, cut.offsets(rows.left.shape[0]))
        kept.keep(use, parts, IndexDirection(x, shared.view(d.shape)))
    elif rows is not None and _prefers_rows(rows, cut):
        squared = op.norms(x, d, weight, bias, parts, cut)
        kept.keep(use, parts, RowDirection(rows, parts.bias))
    else:
        of_weight = op.dense(x, d, weight, cut) if parts.weight else None
        of_bias = op.bias_dense(d, bias, cut) if parts.bias else None
        squared = kept.keep_dense(use, weight, of_weight, bias, of_bias)
    return squared.to(use.session.probe.dtype)


def _prefers_rows(rows: Rows, cut: MicroBatches) -> bool:
    """Counted per row: norms, forward and backward take 5 s (I + O) / 2 by pairs, ``G_k`` takes I O."""
    outputs, inputs = rows.left.shape[1], rows.right.shape[1]
    segment = rows.left.shape[0] // cut.samples * cut.size
    return 5 * segment * (inputs + outputs) < 2 * inputs * outputs


def _add_products(
    use: Use, factors: Tensor, onto: Tensor, queries: Tensor, keys: Tensor, values: Tensor, bias: bool
) -> Tensor:
    cut, queries = use.session.micro_batches, queries.reshape(-1, queries.shape[-1])
    moved = outer_apply(queries, keys, values, cut.offsets(queries.shape[0]), bias)
    return cut.scaled(moved.view(onto.shape), factors, onto)


def perturbed(parameter: Tensor, gradients: Tensor, factors: Tensor, out: Tensor | None = None) -> Tensor:
    """``p + c_k G_k``: ``[m, *p.shape]``, in the dtype of ``p``."""
    return torch.addcmul(parameter, gradients, aligned(factors, gradients), out=out).to(parameter.dtype)


class Perturbation:
    """What the first pass of a perturbed step leaves for the second.

    Args:
        adaptive: measure and move each parameter in units of its own magnitude: ``G_k`` is then ``|w|^2 grad C_k``, and
            its squared norm ``|| |w| grad C_k ||^2`` (Kwon et al. 2021, arXiv:2102.11600, eq. 7).
        with_gradients: whether the pass that leaves it forms the gradients of the parameters too.
        used_up: whether one pass at perturbed weights is all that follows.

    Attributes:
        factors: ``c_k``, ``[m]``, known after the first pass.
    """

    def __init__(self, adaptive: bool = False, with_gradients: bool = False, used_up: bool = False) -> None:
        self.adaptive, self.with_gradients, self.used_up = adaptive, with_gradients, used_up
        self.factors: Tensor | None = None
        self._own: dict[int, Direction] = {}
        self._joined: dict[int, Tensor] = {}

    def measured(self, gradients: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Squared norms ``[m]`` and direction of the gradients ``[m, *p.shape]`` of a parameter."""
        if not self.adaptive:
            return sum_squares(gradients), gradients
        magnitude = parameter.abs()
        gradients = gradients * magnitude
        return sum_squares(gradients), gradients * magnitude

    def keep(self, use: Use, parts: Parts, direction: Direction) -> None:
        """The direction of an operation that makes up the gradients of the ``parts`` alone."""
        lineage = use.weight if parts.weight else use.bias
        assert lineage is not None
        self._own[lineage.key] = direction

    def keep_dense(
        self, use: Use, weight: Tensor | None, of_weight: Tensor | None, bias: Tensor | None, of_bias: Tensor | None
    ) -> Tensor:
        """As :meth:`keep`, for gradients ``[m, *p.shape]`` (None for what the operation does not make up alone).

        Returns:
            Their squared norms ``[m]``.
        """
        squared: list[Tensor] = []
        moved: list[Tensor | None] = [None, None]
        for place, (parameter, gradients) in enumerate(((weight, of_weight), (bias, of_bias))):
            if parameter is not None and gradients is not None:
                one, moved[place] = self.measured(gradients, parameter)
                squared.append(one)
        direction = DenseDirection(moved[0], moved[1], self.used_up)
        self.keep(use, Parts(of_weight is not None, of_bias is not None), direction)
        return reduce(torch.add, squared)

    def keep_joined(self, lineage: Lineage, gradients: Tensor) -> Tensor:
        """Gradients ``[m, *p.shape]`` of a parameter that is used several times; their squared norms ``[m]``."""
        squared, self._joined[lineage.key] = self.measured(gradients, lineage.parameter.detach())
        return squared

    def of(self, use: Use) -> Direction | None:
        """The direction of an operation; None if nothing that it takes was reached by the loss."""
        present = [lineage for lineage in (use.weight, use.bias) if lineage is not None]
        own = next((self._own[lineage.key] for lineage in present if lineage.key in self._own), None)
        shares = self._share(use.weight), self._share(use.bias)
        if shares == (None, None):
            return own
        if own is None:
            return DenseDirection(*shares)
        assert isinstance(own, DenseDirection)  # the other parameter, of which there is but a dense form
        return DenseDirection(
            own.of_weight if shares[0] is None else shares[0], own.of_bias if shares[1] is None else shares[1]
        )

    def _share(self, lineage: Lineage | None) -> Tensor | None:
        if lineage is None or lineage.key not in self._joined:
            return None
        return lineage.lift_each(self._joined[lineage.key])


class Perturbed(Function):
    """``y = op(x_k, w + c_k G_k, b + c_k H_k)``."""

    @staticmethod
    def forward(
        ctx: Any, use: Use, direction: Direction, factors: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        ctx.use, ctx.direction = use, direction
        ctx.save_for_backward(factors, x, weight, bias)
        return direction.forward(use, factors, x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        use, op, (factors, x, weight, bias) = ctx.use, ctx.use.op, ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[3:]
        # The next forward belongs to another loss. (The probe, which tells this elsewhere, is not in this graph.)
        use.session.consumed = True
        d = op.laid_out(d)
        dx = ctx.direction.transpose(use, factors, d, weight, x) if needs_x else None
        dw = op.outer(x, d, weight) if needs_weight else None
        db = op.bias_total(d, bias) if needs_bias else None
        return None, None, None, dx, dw, db
