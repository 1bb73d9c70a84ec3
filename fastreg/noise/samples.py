"""Gradients of single samples over some data: their mean, their norms, their rows, and their second moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastreg.attach import buffers_kept
from fastreg.curvature.linearization import Batch, Linearization
from fastreg.curvature.matrices import ModelOperator, seeded
from fastreg.curvature.products import Product, fisher_product
from fastreg.errors import FastregError
from fastreg.loss import first_tensor
from fastreg.stats import per_sample_grad_norms


@dataclass(frozen=True)
class Mean:
    """First moments of the data.

    Attributes:
        gradient: of the mean loss, ``[D]``.
        loss: the mean loss, 0-d.
        samples: N.
    """

    gradient: Tensor
    loss: Tensor
    samples: int


class SecondMoment(ModelOperator):
    r"""The uncentred second moment of the gradients of single samples, ``(1/N) sum_i g_i g_i'``, and its parts.

    It is the empirical Fisher matrix of all the data. Arguments as for :class:`fastreg.curvature.Hessian`; the
    outputs have at least two dimensions, ``[B, ..., C]``, and ``loss_fn`` is given the tensor of logits where they are
    an object that has them. Everything is exact, up to rounding.

    Raises:
        FastregError: at the first product or pass: batch norm in training mode (it couples samples, so that there is
            no gradient of one of them: call ``model.eval()``); a ``loss_fn`` that contains parameters, as weight
            decay does; see :class:`fastreg.curvature.Hessian`.

    Example:
        >>> import torch
        >>> from fastreg.noise.samples import SecondMoment
        >>> model, data = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> moment = SecondMoment(model, torch.nn.functional.cross_entropy, data)
        >>> moment.mean().gradient.shape, moment.squared_norms().shape, next(moment.deviations()).shape
        (torch.Size([8]), torch.Size([8]), torch.Size([8, 8]))
    """

    _mean_kept: tuple[list[object], Mean] | None = None

    def product(self, linear: Linearization, targets: Tensor, number: int) -> Product:
        return fisher_product(linear, "empirical", self.loss_fn, targets)

    def mean(self) -> Mean:
        """Gradient, loss and number of samples; one forward and backward, kept until the model changes.

        What ``p.data`` is changed by in place is not seen.
        """
        state = self._state()
        if self._mean_kept is None or self._mean_kept[0] != state:
            self._mean_kept = state, self._measured()
        return self._mean_kept[1]

    def squared_norms(self) -> Tensor:
        """``||g_i||^2``, ``[N]`` in the order of the data, float64; one forward and backward, no gradient is formed."""
        found = []
        for inputs, targets in self._visited():
            named = per_sample_grad_norms(self.model, self._loss_of, (inputs, targets), per_parameter=True)
            found.append(reduce(torch.add, (named[name].double() for name in self.parameters)))
        return torch.cat(found)

    def deviations(self, first: int = 0) -> Iterator[Tensor]:
        """``g_i - gbar`` as rows ``[b, D]``, batch by batch, from batch ``first`` on: ``b D`` numbers at a time."""
        mean = self.mean().gradient
        for inputs, targets in self._visited(first):
            linear = Linearization(self.model, self.parameters, inputs, 1, spread=True, apart=True)
            loss = linear.loss_once(self.loss_fn, targets, linear.logits())
            found = linear.unweighted(linear.gradients(loss))
            yield torch.cat([part.flatten(1).to(self.dtype) for part in found], 1).sub_(mean)

    def _measured(self) -> Mean:
        gradient = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        total, samples = gradient.new_zeros((), dtype=torch.float64), 0
        for inputs, targets in self._visited():
            linear = Linearization(self.model, self.parameters, inputs)
            loss, slope = self._slope(linear, targets)
            parts = [part.reshape(-1).to(self.dtype) for part in linear.pull_back(slope)]
            count = linear.micro_batches.samples
            gradient.add_(torch.cat(parts), alpha=count)
            total.add_(loss, alpha=count)
            samples += count
        if not samples:
            raise FastregError("curvature: data must hold at least one batch, got none")
        return Mean(gradient / samples, (total / samples).to(self.dtype), samples)

    def _slope(self, linear: Linearization, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch and its gradient by the logits, through which alone it depends on parameters."""
        logits = linear.logits().detach().requires_grad_()
        loss = linear.loss_once(self.loss_fn, targets, logits)
        slope, *direct = torch.autograd.grad(loss, [logits, *self.parameters.values()], allow_unused=True)
        for name, part in zip(self.parameters, direct):
            if part is not None:
                raise FastregError(
                    "noise: loss_fn must depend on parameters through the outputs only, got one that contains "
                    f"{name!r} (leave a penalty out: it belongs to no sample, and changes no covariance)"
                )
        return loss.detach(), slope

    def _loss_of(self, outputs: object, targets: Tensor) -> Tensor:
        return self.loss_fn(first_tensor(outputs), targets)

    def _visited(self, first: int = 0) -> Iterator[Batch]:
        """Every batch from ``first`` on, under the random numbers that products run the model with."""
        _refuse_coupled(self.model)
        with seeded(self.seed, self.device):
            for number, batch in enumerate(self._shown()):
                if number >= first:
                    with seeded(self.seed + number, self.device), buffers_kept(self.model):
                        yield batch


def _refuse_coupled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise FastregError(
                f"noise: model must not couple the samples of a batch, got {type(module).__name__} {name!r} on batch "
                "statistics (call model.eval(), or use GroupNorm)"
            )
