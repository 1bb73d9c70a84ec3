"""Hessian, generalised Gauss-Newton and Fisher matrix of a model on data, as operators."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from fastreg.curvature.linearization import Batch, Linearization, LossFunction
from fastreg.curvature.operator import CurvatureOperator
from fastreg.curvature.products import FISHER_KINDS, Product, fisher_product, ggn_product, hessian_product
from fastreg.curvature.vectors import named_parameters, unflatten
from fastreg.errors import FastregError


class ModelOperator(CurvatureOperator):
    """A mean over the samples of some data of one matrix per batch.

    For a single batch the recorded forward and first backward are kept, with their memory, from one product to the
    next, as long as no parameter, buffer or mode changes: a product then takes 2.0 times a gradient's layer products,
    instead of 2.67. What ``p.data`` is changed by in place is not seen.
    Over several batches each is recorded again for every :meth:`apply`, once for all its rows.

    The model is run in its current mode; buffers and torch's random numbers stay as they are, and dropout draws the
    same masks in every product.

    Args:
        model: run on every batch.
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss over samples, scalar.
        data: one batch ``(inputs, targets)``, tuple or list, or an iterable of batches that can be iterated again (a
            list, a ``DataLoader``), in which samples count alike.
        parameters: those that the matrix is about (one layer's, say); all that require grad by default.
        seed: of dropout, and of the order of a loader that shuffles without a generator of its own.
        progress: show a bar over batches (needs tqdm).

    Raises:
        FastregError: the data cannot be iterated again, or are empty; see :func:`fastreg.curvature.batched_hvp`.
    """

    parameters: dict[str, nn.Parameter]

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        data: Batch | Iterable[Batch],
        *,
        parameters: Iterable[nn.Parameter] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        super().__init__(named_parameters(model, parameters))
        if isinstance(data, Iterator):
            raise FastregError(
                f"curvature: data must be iterable more than once, got {type(data).__name__} (pass a list or a loader)"
            )
        # The second entry of a batch is its targets; the second of a list of batches is a batch.
        single = isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[1], (tuple, list))
        self.model, self.seed, self.progress = model, seed, progress
        # Only an exact or a sampled Fisher matrix, which never asks for it, may go without.
        self.loss_fn: LossFunction = cast(LossFunction, loss_fn)
        self._batches: Iterable[Batch] = (cast(Batch, data),) if single else cast(Iterable[Batch], data)
        self._kept: tuple[list[object], Linearization, Product] | None = None
        self._keeps = single

    @abstractmethod
    def product(self, linear: Linearization, targets: Tensor, number: int) -> Product:
        """The product with the matrix of batch ``number``."""

    def apply(self, rows: Tensor) -> Tensor:
        # A loader that shuffles must draw the same order every time: dropout and sampled labels go by place in it.
        with seeded(self.seed, self.device):
            if self._keeps:
                ((inputs, targets),) = self._batches
                return self._products(rows, self._recorded(0, inputs, targets)[1])
            return self._mean(rows)

    def _mean(self, rows: Tensor) -> Tensor:
        """The mean over batches, weighted by their samples."""
        total, samples = torch.zeros_like(rows), 0
        for number, (inputs, targets) in enumerate(self._shown()):
            linear, product = self._recorded(number, inputs, targets)
            count = linear.micro_batches.samples
            total.add_(self._products(rows, product), alpha=count)
            samples += count
        if not samples:
            raise FastregError("curvature: data must hold at least one batch, got none")
        return total / samples

    def _products(self, rows: Tensor, product: Product) -> Tensor:
        found = torch.empty_like(rows)
        for row, onto in zip(rows, found, strict=True):
            torch.cat([part.reshape(-1).to(self.dtype) for part in product(self._parts(row))], out=onto)
        return found

    def _recorded(self, number: int, inputs: object, targets: Tensor) -> tuple[Linearization, Product]:
        if self._kept is not None and self._kept[0] == self._state():
            return self._kept[1:]
        # A model may have been given others since, which these vectors are not about.
        named_parameters(self.model, self.parameters.values())
        with seeded(self.seed + number, self.device):
            linear = Linearization(self.model, self.parameters, inputs)
        product = self.product(linear, targets, number)
        if self._keeps:
            self._kept = self._state(), linear, product
        return linear, product

    def _state(self) -> list[object]:
        """What a recorded forward depends on. Recording itself moves versions of buffers, though not the buffers."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        modes = (module.training for module in self.model.modules())
        return [*((id(t), t.data_ptr(), t._version) for t in tensors), *modes]

    def _shown(self) -> Iterable[Batch]:
        if not self.progress:
            return self._batches
        from tqdm import tqdm

        return tqdm(self._batches, desc=type(self).__name__, unit="batch", leave=False)

    def _parts(self, row: Tensor) -> list[Tensor]:
        parts = unflatten(row, self.parameters)
        return [part.to(p.dtype) for part, p in zip(parts.values(), self.parameters.values(), strict=True)]


class Hessian(ModelOperator):
    """The Hessian of the mean loss; arguments as for :class:`ModelOperator`.

    Example:
        >>> import torch
        >>> from fastreg.curvature import Hessian
        >>> model, data = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> hessian = Hessian(model, torch.nn.functional.cross_entropy, data)
        >>> (hessian @ torch.ones(8)).shape, hessian.dense().shape
        (torch.Size([8]), torch.Size([8, 8]))
    """

    def product(self, linear: Linearization, targets: Tensor, number: int) -> Product:
        return hessian_product(linear, self.loss_fn, targets)


class GGN(ModelOperator):
    """The generalised Gauss-Newton matrix (see :func:`fastreg.curvature.ggn_vp`); arguments as for the Hessian."""

    def product(self, linear: Linearization, targets: Tensor, number: int) -> Product:
        return ggn_product(linear, self.loss_fn, targets)


class Fisher(ModelOperator):
    """A Fisher information matrix (see :func:`fastreg.curvature.fisher_vp`); other arguments as for the Hessian.

    Args:
        kind: ``"sampled"``, ``"empirical"`` or ``"exact"``.
        seed: of dropout and of the labels of ``sampled``, which are the same in every product.

    Example:
        >>> import torch
        >>> from fastreg.curvature import Fisher
        >>> model, data = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> float(Fisher(model, None, data, kind="exact").dense().trace()) > 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        data: Batch | Iterable[Batch],
        *,
        kind: str = "sampled",
        parameters: Iterable[nn.Parameter] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        super().__init__(model, loss_fn, data, parameters=parameters, seed=seed, progress=progress)
        if kind not in FISHER_KINDS:
            raise FastregError(f"Fisher: kind must be one of {FISHER_KINDS}, got {kind!r}")
        self.kind = kind

    def product(self, linear: Linearization, targets: Tensor, number: int) -> Product:
        return fisher_product(linear, self.kind, self.loss_fn, targets, self.seed, number)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of their own inside the block."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed, which seeds devices that are not set back.
        torch.default_generator.manual_seed(seed)
        for one in devices:
            torch.cuda.default_generators[torch.device(one).index or 0].manual_seed(seed)
        yield
