"""Convolutions as bilinear maps.

Rows of the layer are pixels: ``G_k`` is the weight gradient of the samples of micro-batch ``k``. All of them at once
are the weight gradient of *one* convolution with ``m`` times the groups, once micro-batches lie side by side along the
channels (Rochette et al. 2019, arXiv:1912.06015, for single samples); ``B(x_k, G_k)`` and ``B^T(d_k, G_k)`` are grouped
convolutions in the same layout. Short micro-batches go by :mod:`fastreg.rules.conv_gram`, which never stores ``G_k``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from fastreg.micro_batches import MicroBatches, times
from fastreg.rules.bilinear import Bilinear, MaybeTensor, Parts, row_dots, sum_squares
from fastreg.rules.conv_gram import PixelGrid, pixel_grid
from fastreg.rules.conv_layout import apart, beside, scaled_rows

# Elements of G_k held at once where they are only added and squared: a megabyte in float32, so that both passes find
# them in the second-level cache, and memory does not grow with the number of micro-batches.
BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Convolution(Bilinear):
    """``y = conv(x, w) + b`` for ``x [n, C, *S]``, ``w [O, C / groups, *kernel]``, ``b [O]``.

    If ``transposed``, ``w`` is ``[C, O / groups, *kernel]`` and ``y`` the big image.
    """

    # Multiply-adds of a large product in the time of writing one element of a stored G_k to memory, or of reading it
    # there, layout changes of the convolution library included (bench/NOTES.md, "Convolutions").
    STORE_COST: ClassVar[int] = 200

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve(x, weight, bias, self.groups)

    def transpose(self, d: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return self._gradients(d, x, weight, self.groups, [True, False, False])[0]

    def outer(self, x: Tensor, d: Tensor, weight: Tensor) -> Tensor:
        return self._gradients(d, x, weight, self.groups, [False, True, False])[1]

    def form(self, x: Tensor, y: Tensor, cut: MicroBatches) -> str:
        return "pixel pairs" if self._pairs_pixels(x, y, cut) else "dense"

    def bias_view(self, bias: Tensor, y: Tensor) -> tuple[int, ...]:
        return (*bias.shape, *(1,) * len(self.kernel))

    def dense(self, x: Tensor, d: Tensor, weight: Tensor, cut: MicroBatches) -> Tensor:
        return cut.fold(lambda a, e: self.segment_outer(self.lay(a), e, weight), x, d)

    def dense_pull(self, x: Tensor, gradients: Tensor, cut: MicroBatches) -> Tensor:
        return cut.map(lambda a, g: self.segment_forward(self.lay(a), g, None), (x,), (gradients,))

    def dense_push(self, d: Tensor, gradients: Tensor, x: Tensor, cut: MicroBatches) -> Tensor:
        return cut.map(self.segment_transpose, (d, x), (gradients,))

    def forward_each(self, x: Tensor, weights: Tensor, biases: Tensor | None, cut: MicroBatches) -> Tensor:
        given = (weights,) if biases is None else (weights, biases)
        return cut.map(lambda a, w, b=None: self.segment_forward(self.lay(a), w, b), (x,), given)

    def lay(self, x: Tensor) -> Tensor:
        """``x [m, b, C, *S]`` as the next two methods take it; a copy if ``b > 1``."""
        return beside(x)

    def segment_outer(self, laid: Tensor, d: Tensor, weight: Tensor) -> Tensor:
        """The weight gradient of every segment, for ``d [m, b, O, *S']``: ``[m, *w.shape]``."""
        count = d.shape[0]
        all_weights = weight.new_empty(count * weight.shape[0], *weight.shape[1:])
        gradients = self._gradients(beside(d), laid, all_weights, count * self.groups, [False, True, False])
        return gradients[1].unflatten(0, (count, -1))

    def segment_forward(self, laid: Tensor, weights: Tensor, biases: Tensor | None) -> Tensor:
        """Every segment by its own of ``weights [m, *w.shape]`` and ``biases [m, O]``: ``[m, b, O, *S']``."""
        count = weights.shape[0]
        bias = None if biases is None else biases.flatten()
        return apart(self._convolve(laid, weights.flatten(0, 1), bias, count * self.groups), count)

    def segment_transpose(self, d: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        """``[m, b, O, *S'], [m, *w.shape] -> [m, b, C, *S]``; of ``x`` only the shape is read."""
        count, samples, channels = x.shape[:3]
        all_inputs = x.new_empty(samples, count * channels, *x.shape[3:])
        gradients = self._gradients(
            beside(d), all_inputs, weights.flatten(0, 1), count * self.groups, [True, False, False]
        )
        return apart(gradients[0], count)

    def norms(self, x: Tensor, d: Tensor, weight: Tensor, bias: Tensor, parts: Parts, cut: MicroBatches) -> Tensor:
        if not parts.weight:
            return super().norms(x, d, weight, bias, parts, cut)
        costs = self._costs(x, d, cut)
        if costs.gram < costs.store + costs.product:
            squared = self._gram_norms(x, d, cut)
        else:
            squared = self._stored_with_norms(x, d, weight, cut)[1]
        return squared + sum_squares(self.bias_dense(d, bias, cut)) if parts.bias else squared

    def pull(
        self, x: Tensor, d: Tensor, weight: Tensor, bias: Tensor, parts: Parts, cut: MicroBatches
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not parts.weight:
            return super().pull(x, d, weight, bias, parts, cut)
        of_bias: MaybeTensor = self.bias_dense(d, bias, cut) if parts.bias else None
        if self._pairs_pixels(x, d, cut):
            grid, gradients = self._grid(x, d), None
            tangent = cut.map(grid.onto_big if self.transposed else grid.onto_small, self._sides(x, d), ())
            squared = cut.fold(row_dots, d, tangent)
            if parts.bias:
                tangent.add_(self.bias_pull(d, bias, of_bias, cut))
        else:
            gradients, tangent = self._stored_pull(x, d, weight, of_bias, cut)
            squared = sum_squares(gradients)
        return squared + sum_squares(of_bias) if parts.bias else squared, tangent, gradients

    def push(self, x: Tensor, d: Tensor, memo: Tensor | None, cut: MicroBatches) -> Tensor:
        if memo is not None:
            return self.dense_push(d, memo, x, cut)
        grid = self._grid(x, d)
        return cut.map(grid.onto_small if self.transposed else grid.onto_big, self._sides(x, d), ())

    def scaled_pull(
        self, onto: Tensor | None, x: Tensor, tangent: Tensor, memo: Tensor | None, factors: Tensor, cut: MicroBatches
    ) -> Tensor:
        if tangent.dim() == x.dim():
            return super().scaled_pull(onto, x, tangent, memo, factors, cut)
        return scaled_rows(tangent, factors, onto)

    def scaled_push(
        self, x: Tensor, d: Tensor, memo: Tensor | None, factors: Tensor, cut: MicroBatches
    ) -> Tensor:
        if memo is None or memo.numel() > x.numel():
            return super().scaled_push(x, d, memo, factors, cut)
        # Of G_k and its image, the smaller one is scaled.
        return self.push(x, d, times(memo, factors), cut)

    def outer_with_norms(self, x: Tensor, d: Tensor, weight: Tensor, cut: MicroBatches) -> tuple[Tensor, Tensor]:
        costs = self._costs(x, d, cut)
        if costs.gram < costs.store:
            return self.outer(x, d, weight), self._gram_norms(x, d, cut)
        return self._stored_with_norms(x, d, weight, cut)

    def _gram_norms(self, x: Tensor, d: Tensor, cut: MicroBatches) -> Tensor:
        return cut.fold(self._grid(x, d).sq_norms, *self._sides(x, d))

    def _stored_pull(
        self, x: Tensor, d: Tensor, weight: Tensor, of_bias: Tensor | None, cut: MicroBatches
    ) -> tuple[Tensor, Tensor]:
        """Every ``G_k``, and ``B(x_k, G_k)`` plus the bias gradient of ``k``; ``x`` is laid out once for both.

        The latter is ``[m, b, O, *S']`` as the product left it, in rows only if the last micro-batch is ragged:
        :meth:`scaled_pull` reads it once, and does so from either layout.
        """
        pieces = []
        for a, e, *biases in cut.cuts((x, d), () if of_bias is None else (of_bias,)):
            laid = self.lay(a)
            gradients = self.segment_outer(laid, e, weight)
            pieces.append((gradients, self.segment_forward(laid, gradients, biases[0] if biases else None)))
        if len(pieces) == 1:
            return pieces[0]
        tangents = torch.cat([tangent.flatten(0, 1) for _, tangent in pieces])
        return torch.cat([gradients for gradients, _ in pieces]), tangents

    def _stored_with_norms(
        self, x: Tensor, d: Tensor, weight: Tensor, cut: MicroBatches
    ) -> tuple[Tensor, Tensor]:
        """Weight gradient and squared norms from the ``G_k``, a block of micro-batches at a time."""
        block = max(1, BLOCK_ELEMENTS // weight.numel())
        total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))

        def add_and_square(x: Tensor, d: Tensor) -> Tensor:
            squared = []
            for x_block, d_block in zip(x.split(block), d.split(block)):
                gradients = self.segment_outer(self.lay(x_block), d_block, weight)
                total.add_(gradients.sum(0))
                squared.append(sum_squares(gradients))
            return torch.cat(squared)

        squared = cut.fold(add_and_square, x, d)
        return total.to(weight.dtype), squared

    def _pairs_pixels(self, x: Tensor, d: Tensor, cut: MicroBatches) -> bool:
        """Whether two products in pairs of pixels cost less than ``G_k``, written once and read twice."""
        costs = self._costs(x, d, cut)
        return 2 * costs.gram < 3 * (costs.store + costs.product)

    def _costs(self, x: Tensor, d: Tensor, cut: MicroBatches) -> Costs:
        samples = x.shape[0] // cut.samples * cut.size
        big, small = self._sides(x, d)
        elements = big.shape[1] * small.shape[1] // self.groups * prod(self.kernel)
        gram = self._grid(x, d).cost(samples, big.shape[1], small.shape[1]) if self.groups == 1 else float("inf")
        return Costs(gram, self.STORE_COST * elements, samples * prod(small.shape[2:]) * elements)

    def _sides(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """The big and the small image: a transposed convolution has them the other way round."""
        return (d, x) if self.transposed else (x, d)

    def _grid(self, x: Tensor, d: Tensor) -> PixelGrid:
        sizes = (tuple(side.shape[2:]) for side in self._sides(x, d))
        return pixel_grid(*sizes, self.kernel, self.stride, self.padding, self.dilation)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, groups
        )

    def _gradients(
        self, d: Tensor, x: Tensor, weight: Tensor, groups: int, wanted: list[bool]
    ) -> tuple[MaybeTensor, ...]:
        geometry = self.stride, self.padding, self.dilation, self.transposed, self.output_padding
        return torch.ops.aten.convolution_backward(d, x, weight, None, *geometry, groups, wanted)


@dataclass(frozen=True)
class Costs:
    """Multiply-adds per micro-batch.

    Attributes:
        gram: one product of the form without ``G_k``.
        store: writing ``G_k`` to memory, or reading it there.
        product: the arithmetic of one product that involves ``G_k``.
    """

    gram: float
    store: int
    product: int
