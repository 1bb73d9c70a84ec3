"""A training step at perturbed weights, one perturbation per micro-batch, in two batched passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastreg.errors import FastregError
from fastreg.perturbed_passes import PerturbedPasses
from fastreg.session import Phase, Session

Closure = Callable[[], Tensor]


class PerturbedStep:
    """Runs a closure twice: at the weights, and at ``w + c_k G_k`` for every micro-batch k at once.

    ``G_k`` is the gradient of the summed loss of micro-batch k as the closure scales it. The first run forms no
    parameter gradient; the second leaves the mean gradient of the perturbed micro-batches in ``.grad``. Both draw the
    same random numbers, and buffers (batch norm statistics) are as after the first.

    Args:
        model: run by the closure; recorded only inside :meth:`__call__`.
        micro_batch_size: b, samples per micro-batch.
        parameters: those that are perturbed.
        factors: takes the squared norms ``||G_k||^2 [m]`` of one forward and returns ``c_k [m]``.
        adaptive: as for :class:`fastreg.rules.perturbation.Perturbation`.
    """

    def __init__(
        self,
        model: nn.Module,
        micro_batch_size: int,
        parameters: Iterable[nn.Parameter],
        factors: Callable[[Tensor], Tensor],
        adaptive: bool = False,
    ) -> None:
        self._passes = PerturbedPasses(model, micro_batch_size, parameters, adaptive)
        self.factors = factors

    def remove(self) -> None:
        """Detach from the model."""
        self._passes.remove()

    def __call__(self, closure: Closure) -> Tensor:
        """The loss at the unperturbed weights.

        Raises:
            FastregError: the closure does not run the model and a backward, or does so differently the second time, or
                does not return the loss.
        """
        with torch.enable_grad(), self._passes.same_random_numbers() as rewind:
            with self._passes.first(Phase.DIRECTIONS, used_up=True) as sessions:
                loss = closure()
            _check_returned(loss)
            for session in sessions:
                self._direct(session)
            rewind()
            with self._passes.again(sessions):
                closure()
        return loss.detach()

    def _direct(self, session: Session) -> None:
        squared = session.probe.grad
        if squared is None:
            raise FastregError("step: the closure must run a backward for each forward of the model, got none for one")
        assert session.directions is not None
        session.directions.factors = self.factors(squared)


def _check_returned(loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise FastregError(
            f"step: the closure must return the loss, got {type(loss).__name__} (end it with `return loss`)"
        )
