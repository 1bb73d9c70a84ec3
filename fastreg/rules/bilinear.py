"""What a rule says about an operation: one bilinear map, from which every mode of the engine follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastreg.kernels import segment_dot
from fastreg.micro_batches import MicroBatches

# A parameter of an operation, or a tensor made from it: None where there is none. ``Parts`` says which of them a method
# reads, a promise that types cannot hold.
MaybeTensor: TypeAlias = Any


class Parts(NamedTuple):
    """Which parameters of an operation a computation is about."""

    weight: bool
    bias: bool


class Rows(NamedTuple):
    """``G_k = sum_s left_s right_s^T`` over the rows of micro-batch ``k``, for a parameter ``[V, D]``.

    Attributes:
        left: ``[S, V]``, or ``[S]`` int64: rows of the identity (a gather).
        right: ``[S, D]``.
    """

    left: Tensor
    right: Tensor


class Bilinear(ABC):
    """``y = B(x, w) + b``: linear in the parameters for fixed ``x``, and linear in ``x`` for fixed ``w``.

    ``b`` is added with broadcasting. ``G_k`` is the gradient of micro-batch ``k``: ``outer(x, d)`` over its rows
    only, where ``d`` is the gradient of the loss with respect to ``y``. The engine derives from these methods

    * the squared norms ``||G_k||^2``,
    * their double backward: ``d/dd = 2 c_k B(x, G_k)`` (:meth:`pull`), ``d/dx = 2 c_k B^T(d, G_k)`` (:meth:`push`),
    * parameters used several times, whose ``G_k`` is the sum over uses (the three ``dense`` methods).

    A rule may override :meth:`norms`, :meth:`pull` and :meth:`push` with forms that never store ``G_k``, and
    :meth:`outer_with_norms` with a fused one. All row tensors keep their samples along dimension 0.
    """

    @abstractmethod
    def forward(self, x: Tensor, weight: MaybeTensor, bias: MaybeTensor) -> Tensor:
        """``B(x, w) + b``; with ``bias=None`` the bilinear map alone (the tangent and up-chain product)."""

    def forward_onto(self, onto: Tensor | None, x: Tensor, weight: MaybeTensor) -> Tensor:
        """``onto + B(x, w)``; ``onto`` may be overwritten."""
        y = self.forward(x, weight, None)
        return y if onto is None else onto.add_(y)

    def laid_out(self, d: Tensor) -> Tensor:
        """``d`` in the memory layout that the products read; it is read by several."""
        return d

    @abstractmethod
    def transpose(self, d: Tensor, weight: MaybeTensor, x: Tensor) -> Tensor:
        """``B^T(d, w)``, the gradient with respect to ``x``; of ``x`` only the shape is read."""

    @abstractmethod
    def outer(self, x: Tensor, d: Tensor, weight: MaybeTensor) -> Tensor:
        """The gradient with respect to ``w``, summed over all rows; of ``w`` only the shape is read."""

    @abstractmethod
    def dense(self, x: Tensor, d: Tensor, weight: MaybeTensor, cut: MicroBatches) -> Tensor:
        """Every ``G_k``: ``[m, *w.shape]``."""

    @abstractmethod
    def dense_pull(self, x: Tensor, gradients: Tensor, cut: MicroBatches) -> Tensor:
        """``B(x_k, G_k)`` for given ``gradients [m, *w.shape]``; shaped as ``y``."""

    @abstractmethod
    def dense_push(self, d: Tensor, gradients: Tensor, x: Tensor, cut: MicroBatches) -> Tensor:
        """``B^T(d_k, G_k)`` for given ``gradients [m, *w.shape]``; shaped as ``x``."""

    def forward_each(self, x: Tensor, weights: Tensor, biases: Tensor | None, cut: MicroBatches) -> Tensor:
        """``B(x_k, w_k) + b_k`` for given ``weights [m, *w.shape]`` and ``biases [m, *b.shape]``; shaped as ``y``."""
        return self.with_biases(self.dense_pull(x, weights, cut), biases, cut)

    def with_biases(self, y: Tensor, biases: Tensor | None, cut: MicroBatches) -> Tensor:
        """``y + b_k`` for given ``biases [m, *b.shape]``."""
        if biases is None:
            return y
        view = self.bias_view(biases[0], y)
        aligned = biases.reshape(cut.count, *(1,) * (y.dim() - len(view)), *view)
        return cut.map(torch.add, (y,), (aligned,))

    def form(self, x: Tensor, y: Tensor, cut: MicroBatches) -> str:
        """For reports: how ``G_k`` is represented, for input ``x`` and output ``y``."""
        return "dense"

    def rows(self, x: Tensor, d: Tensor) -> Rows | None:
        """The row form of ``G_k`` if the operation has one: it joins several uses without storing ``G_k``."""
        return None

    def bias_view(self, bias: MaybeTensor, y: Tensor) -> tuple[int, ...]:
        """The shape in which ``b`` broadcasts against one row ``y[0]``, right-aligned."""
        return tuple(bias.shape)

    def bias_total(self, d: Tensor, bias: MaybeTensor) -> Tensor:
        """The gradient with respect to ``b``, summed over all rows."""
        return d.sum_to_size(self.bias_view(bias, d)).reshape(bias.shape)

    def bias_dense(self, d: Tensor, bias: MaybeTensor, cut: MicroBatches) -> Tensor:
        """The gradient with respect to ``b`` of every micro-batch: ``[m, *b.shape]``."""
        return cut.reduce(d, self.bias_view(bias, d)).reshape(cut.count, *bias.shape)

    def bias_pull(self, y: Tensor, bias: MaybeTensor, gradients: Tensor, cut: MicroBatches) -> Tensor:
        """``gradients [m, *b.shape]`` broadcast to the rows of ``y``."""
        view = self.bias_view(bias, y)
        aligned = gradients.reshape(cut.count, *(1,) * (y.dim() - len(view)), *view)
        return cut.map(lambda rows, g: g.expand_as(rows), (y,), (aligned,))

    def norms(
        self, x: Tensor, d: Tensor, weight: MaybeTensor, bias: MaybeTensor, parts: Parts, cut: MicroBatches
    ) -> Tensor:
        """Squared norms ``[m]`` of the gradients of the ``parts`` asked for."""
        squared: MaybeTensor = None
        if parts.weight:
            squared = sum_squares(self.dense(x, d, weight, cut))
        if parts.bias:
            of_bias = sum_squares(self.bias_dense(d, bias, cut))
            squared = of_bias if squared is None else squared + of_bias
        return squared

    def pull(
        self, x: Tensor, d: Tensor, weight: MaybeTensor, bias: MaybeTensor, parts: Parts, cut: MicroBatches
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``(||G_k||^2, B(x, G_k) + G_k of b, memo)``; ``memo`` is handed to :meth:`push`."""
        squared: MaybeTensor = None
        tangent = gradients = None
        if parts.weight:
            gradients = self.dense(x, d, weight, cut)
            squared = sum_squares(gradients)
            tangent = self.dense_pull(x, gradients, cut)
        if parts.bias:
            of_bias = self.bias_dense(d, bias, cut)
            squared = sum_squares(of_bias) if squared is None else squared + sum_squares(of_bias)
            spread = self.bias_pull(d, bias, of_bias, cut)
            tangent = spread if tangent is None else tangent.add_(spread)
        return squared, tangent, gradients

    def push(self, x: Tensor, d: Tensor, memo: MaybeTensor, cut: MicroBatches) -> Tensor:
        """``B^T(d, G_k)`` shaped as ``x``."""
        return self.dense_push(d, memo, x, cut)

    def scaled_pull(
        self,
        onto: Tensor | None,
        x: Tensor,
        tangent: MaybeTensor,
        memo: MaybeTensor,
        factors: Tensor,
        cut: MicroBatches,
    ) -> Tensor:
        """``onto + factors_k * tangent`` with what :meth:`pull` returned; ``onto`` may be overwritten."""
        return cut.scaled(tangent, factors, onto)

    def scaled_push(
        self, x: Tensor, d: Tensor, memo: MaybeTensor, factors: Tensor, cut: MicroBatches
    ) -> Tensor:
        """``factors_k B^T(d, G_k)``."""
        return cut.scale_(self.push(x, d, memo, cut), factors)

    def outer_with_norms(self, x: Tensor, d: Tensor, weight: MaybeTensor, cut: MicroBatches) -> tuple[Tensor, Tensor]:
        """The weight gradient and the squared norms ``[m]`` of its micro-batches."""
        gradients = self.dense(x, d, weight, cut)
        return gradients.sum(0), sum_squares(gradients)

    def with_norms(
        self, x: Tensor, d: Tensor, weight: MaybeTensor, bias: MaybeTensor, parts: Parts, cut: MicroBatches
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The gradients of the ``parts`` asked for (None for the others), and their squared norms ``[m]``."""
        squared: MaybeTensor = None
        dw = db = None
        if parts.weight:
            dw, squared = self.outer_with_norms(x, d, weight, cut)
        if parts.bias:
            of_bias = self.bias_dense(d, bias, cut)
            db, of_bias = of_bias.sum(0), sum_squares(of_bias)
            squared = of_bias if squared is None else squared + of_bias
        return dw, db, squared


def sum_squares(gradients: Tensor) -> Tensor:
    """``[m, ...] -> [m]``: squared norms, accumulated in float32 or wider."""
    return row_dots(gradients, gradients)


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """``[m, ...], [m, ...] -> [m]``: inner products, accumulated in float32 or wider."""
    count = x.shape[0]
    return segment_dot(x.reshape(count, -1), y.reshape(count, -1), range(count + 1))
