"""The covariance of minibatch gradients, as an operator on the parameters and through its exact parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreg.curvature.linearization import Batch, LossFunction
from fastreg.curvature.traces import check_count
from fastreg.errors import FastregError
from fastreg.noise.samples import SecondMoment


class NoiseCovariance(SecondMoment):
    r"""The covariance ``[D, D]`` of the gradient of a minibatch of S samples out of the N of some data.

        C = factor * [ (1/N) sum_i g_i g_i' - gbar gbar' ],      g_i = grad l_i,  gbar = (1/N) sum_i g_i

        factor = 1/S                        S draws with replacement
        factor = 1/S * (N - S) / (N - 1)    S different samples

    It is the covariance over the draw, exact on these data for every N (1/N, not 1/(N - 1), inside the bracket), in
    units of squared gradients. ``l_i >= 0`` and a mean loss of 0 make it 0 (Prop. 2). A product takes what one with
    the empirical Fisher matrix takes, and one gradient for every new state of the model.

    Being an operator it has traces, spectra and products; :meth:`trace`, :meth:`diagonal` and :meth:`top` are exact
    and cheaper. None of them depends on how the data are cut into batches, up to rounding.

    Args:
        model: run on every batch in its current mode; batch norm must not be in training mode.
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss over samples, scalar.
        data: all N samples: one batch ``(inputs, targets)``, or an iterable of batches that can be iterated again.
            Augmentation and dropout count as part of the data: what ``seed`` draws is drawn in every pass.
        batch_size: S; 1 for the covariance of single samples.
        replacement: whether a minibatch may hold a sample more than once.
        parameters: those that the matrix is about; all that require grad by default.
        seed: of dropout, and of the order of a loader that shuffles without a generator of its own.
        progress: show a bar over batches (needs tqdm).

    Raises:
        FastregError: ``batch_size`` is not an integer >= 1, or above N without replacement (at the first use);
            outputs of fewer than two dimensions; batch norm on batch statistics; a ``loss_fn`` that contains
            parameters, as weight decay does (leave it out: C is the same); see :class:`fastreg.curvature.Hessian`.

    Source: Ziyin, Liu, Mori, Ueda 2021, arXiv:2102.05375, Prop. 1 and 2.

    Example:
        >>> import torch
        >>> from fastreg.noise.covariance import NoiseCovariance
        >>> model, data = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> noise = NoiseCovariance(model, torch.nn.functional.cross_entropy, data, batch_size=4)
        >>> bool(torch.isclose(noise.trace(), noise.dense().trace(), rtol=1e-4))
        True
        >>> values, vectors = noise.top(2)
        >>> values.shape, vectors.shape, (noise @ vectors).shape
        (torch.Size([2]), torch.Size([8, 2]), torch.Size([8, 2]))
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Batch | Iterable[Batch],
        *,
        batch_size: int = 1,
        replacement: bool = True,
        parameters: Iterable[nn.Parameter] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        super().__init__(model, loss_fn, data, parameters=parameters, seed=seed, progress=progress)
        check_count("NoiseCovariance", "batch_size", batch_size, 1)
        self.batch_size, self.replacement = batch_size, replacement

    @property
    def factor(self) -> float:
        """From the covariance of single samples to that of minibatches: ``1/S``, or ``(N - S) / (S (N - 1))``."""
        size, samples = self.batch_size, self.mean().samples
        if self.replacement:
            return 1 / size
        if size > samples:
            raise FastregError(
                f"NoiseCovariance: batch_size must be at most the number of samples, {samples}, without replacement, "
                f"got {size}"
            )
        # A single sample has no covariance, whatever 0/0 is taken for.
        return (samples - size) / (size * max(samples - 1, 1))

    def apply(self, rows: Tensor) -> Tensor:
        gradient = self.mean().gradient
        return self.factor * torch.addr(super().apply(rows), rows @ gradient, gradient, alpha=-1)

    def sample_trace(self) -> Tensor:
        r"""``mean_i ||g_i||^2 - ||gbar||^2``, the trace for S = 1, 0-d; no gradient of a sample is formed.

        Where it is far below ``||gbar||^2``, the difference loses as many digits as that ratio has.
        """
        squared = self.squared_norms().mean() - self.mean().gradient.double().square().sum()
        return squared.to(self.dtype)

    def trace(self) -> Tensor:
        """``tr C``, 0-d: :meth:`sample_trace` times :attr:`factor`."""
        return self.factor * self.sample_trace()

    def diagonal(self) -> Tensor:
        """The diagonal of C, ``[D]``: variances of the elements of a minibatch gradient.

        Through the gradients of single samples, batch by batch: ``b D`` numbers for the largest batch are held.
        """
        total = reduce(torch.add, (rows.square_().sum(0) for rows in self.deviations()))
        return total * (self.factor / self.mean().samples)

    def gram(self) -> Tensor:
        r"""The dual of C, ``[N, N]``: ``(factor / N) (g_i - gbar) . (g_j - gbar)``, with its non-zero eigenvalues.

        Held are, a few times over, ``N^2`` numbers and the gradients of the ``b`` samples of the largest batch,
        ``b D``. Data in M batches are gone through M times, with ``(M + 1) / 2`` gradients of every sample in all:
        cut them as coarsely as memory allows.
        """
        blocks: list[list[Tensor]] = []
        while not blocks or len(blocks[-1]) > 1:
            blocks.append(self._gram_blocks(len(blocks)))
        samples = self.mean().samples
        strips = [torch.cat(row, 1) for row in blocks]
        upper = torch.cat([F.pad(strip, (samples - strip.shape[1], 0)) for strip in strips])
        return (upper.triu() + upper.triu(1).T) * (self.factor / samples)

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        r"""The largest eigenvalues of C and their eigenvectors, exact, through the :meth:`gram` matrix.

            (factor / N) K K' u = lambda u,      v = K' u / ||K' u||,      K the rows g_i - gbar

        Eigenvalues below ``N eps`` of the largest are rounding, and are left out: C has rank N - 1 at most, and
        none where there is no noise.

        Args:
            count: at least 1.

        Returns:
            Descending, ``[k]``, and columns ``[D, k]`` of length 1, of the operator's dtype, with ``k <= count``.

        Raises:
            FastregError: count is not an integer >= 1.
        """
        check_count("top", "count", count, 1)
        values, duals = torch.linalg.eigh(self.gram().double())
        values, duals = values.flip(0)[:count], duals.flip(1)[:, :count].to(self.dtype)
        kept = values > len(duals) * torch.finfo(self.dtype).eps * values[0]
        values, duals = values[kept].to(self.dtype), duals[:, kept]
        vectors = sum(rows.T @ part for rows, part in self._along(duals))
        # In float64: a norm over strided float32 loses four digits over 10^5 elements.
        return values, vectors / torch.linalg.vector_norm(vectors, dim=0, dtype=torch.float64).to(self.dtype)

    def _along(self, duals: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of deviations with the rows of ``duals [N, k]`` that belong to the same samples."""
        start = 0
        for rows in self.deviations():
            yield rows, duals[start : start + len(rows)]
            start += len(rows)

    def _gram_blocks(self, first: int) -> list[Tensor]:
        """Products of the deviations of batch ``first`` with those of itself and of every later batch."""
        later = self.deviations(first)
        held = next(later)
        return [held @ held.T, *(held @ rows.T for rows in later)]
