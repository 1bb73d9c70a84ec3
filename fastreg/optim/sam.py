"""Sharpness-aware minimisation, with a perturbation per micro-batch in one batched pass."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastreg.errors import FastregError
from fastreg.optim.delegating import Delegating
from fastreg.perturbed_step import PerturbedStep


class SAM(Delegating):
    r"""m-SAM: every micro-batch is perturbed along its own gradient, all of them in one batched pass.

        step along  (1/B) sum_k b_k grad C_k(w + e_k),     e_k = rho grad C_k(w) / ||grad C_k(w)||

    ``C_k`` is the mean loss of micro-batch k, of ``b_k`` samples, B in all. It equals running SAM on one micro-batch
    after the other and averaging, to rounding, without m copies of the weights: for short micro-batches
    ``e_k`` acts through the rows it is made of. With ``micro_batch_size=None`` it is ordinary SAM. Under
    DistributedDataParallel every rank perturbs along its own micro-batches.

    Usage is torch's closure convention::

        def closure():
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss
        loss = optimizer.step(closure)

    The closure runs twice, on the same random numbers (dropout); batch norm statistics move once. ``step()`` without a
    closure is the base's step: after ``loss = optimizer.backward(closure)``, which leaves the gradient in ``.grad``,
    so that it can be clipped, or unscaled by a GradScaler (scale the loss in the closure).

    Args:
        base_optimizer: takes the step; its groups, state and checkpoints are this optimizer's.
        model: what the closure runs.
        rho: the length of ``e_k``, in units of the weights; at least 0.
        micro_batch_size: b, samples per micro-batch; None for the whole batch.
        adaptive: measure in units of each weight's magnitude: ``e_k = rho w^2 grad C_k / || |w| grad C_k ||``
            (elementwise; Kwon et al. 2021, arXiv:2102.11600, eq. 7, for all parameters, without its constant).

    Raises:
        FastregError: an argument is out of range; the model is compiled or synchronises batch norm statistics; at the
            step: the closure runs no forward and backward of the model, or not the same ones twice.

    Source: Foret, Kleiner, Mobahi, Neyshabur 2021, arXiv:2010.01412, eq. 3 and section 4.1 (m-sharpness).

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Linear(3, 2)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = fastreg.optim.SAM(base, model, rho=0.05, micro_batch_size=2)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        model: nn.Module,
        rho: float = 0.05,
        micro_batch_size: int | None = None,
        adaptive: bool = False,
    ) -> None:
        super().__init__(base_optimizer)
        if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0 <= rho < float("inf"):
            raise FastregError(f"SAM: rho must be a number >= 0, got {rho!r}")
        size = sys.maxsize if micro_batch_size is None else micro_batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise FastregError(f"SAM: micro_batch_size must be an integer >= 1 or None, got {micro_batch_size!r}")
        self.model, self.rho, self.micro_batch_size, self.adaptive = model, rho, micro_batch_size, adaptive
        parameters = [p for group in base_optimizer.param_groups for p in group["params"]]
        self._passes = PerturbedStep(model, size, parameters, self._factors, adaptive)

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        return self._passes(closure)

    def remove(self) -> None:
        """Detach from the model."""
        self._passes.remove()

    def _factors(self, squared: Tensor) -> Tensor:
        """``rho / ||G_k||``; a micro-batch without a gradient stays where it is."""
        norms = squared.sqrt()
        return torch.where(norms > 0, self.rho / norms, torch.zeros_like(norms))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.base, self.model, self.rho, self.micro_batch_size, self.adaptive)
