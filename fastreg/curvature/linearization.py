"""One recorded forward, and products with the derivatives of what follows it.

With ``z = f(w)`` the outputs for one batch and ``g(w)`` the gradient of its loss, all products share the forward, and
those with the Hessian the first backward. That backward leaves zeros in the place of parameter gradients, with a
graph: differentiated along ``v`` they give

    H v        gradient of <g, v> by w
    J v        gradient of <J^T u, v> by u, at u = 0
    J^T u      a backward

Pearlmutter 1994 (doi:10.1162/neco.1994.6.1.147); J v by two backward passes: Schraudolph 2002
(doi:10.1162/08997660260028683) has it by a forward one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastreg.attach import buffers_kept, check_model
from fastreg.chain import squared_norms, symbolic_gradients
from fastreg.errors import FastregError
from fastreg.graph_walk import refuse_offenders
from fastreg.loss import Reduction, check_loss, first_tensor
from fastreg.micro_batches import MicroBatches
from fastreg.recording import Recorder
from fastreg.rules.spread import Leaves
from fastreg.session import Phase, Session

LossFunction = Callable[[Any, Tensor], Tensor]
# Inputs, as the model is called with, and targets.
Batch = tuple[Any, Tensor]
Vectors = Sequence[Tensor]


class Linearization:
    """The forward of one batch; buffers are left as they were.

    Args:
        model: run in its current mode.
        parameters: name -> parameter, those that vectors are about.
        inputs: ``[B, ...]``, what the model is called with.
        micro_batch_size: b; None: one micro-batch of all samples.
        spread: whether there is another vector for every micro-batch, ``[m, *p.shape]``.
        apart: whether results are by micro-batch too, instead of sums over them.

    Attributes:
        outputs: of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        inputs: object,
        micro_batch_size: int | None = None,
        *,
        spread: bool = False,
        apart: bool = False,
    ) -> None:
        size = micro_batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise FastregError(f"curvature: micro_batch_size must be an integer >= 1 or None, got {size!r}")
        check_model(model)
        self._parameters = list(parameters.values())
        self._names = {id(p): name for name, p in parameters.items()}
        self._known: Session | None = None
        self._spread, self._apart = spread, apart
        size = sys.maxsize if size is None else size
        self._model = model
        self._recorder = recorder = Recorder(model, size, self._parameters, lambda: True)
        recorder.on_open = self._open
        try:
            with torch.enable_grad(), buffers_kept(model):
                self.outputs = model(inputs)
        finally:
            # What is left of it records what is run again; it must not lead back here, or both would outlive their use.
            recorder.on_open = None
            recorder.detach()

    @property
    def micro_batches(self) -> MicroBatches:
        """How the batch is cut."""
        return self._session.micro_batches

    def loss(self, loss_fn: LossFunction, targets: Tensor, outputs: object = None) -> Tensor:
        """The mean loss of the batch: of the model's outputs, or of these.

        Raises:
            FastregError: it is not a scalar, is NaN, or something in it has no second derivative.
        """
        loss = self.loss_once(loss_fn, targets, self.outputs if outputs is None else outputs)
        refuse_offenders(loss, self._session, self._names)
        return loss

    def loss_once(self, loss_fn: LossFunction, targets: Tensor, outputs: object) -> Tensor:
        """The mean loss of these outputs, to be differentiated once."""
        with torch.enable_grad():
            loss = loss_fn(outputs, targets)
        check_loss(loss, self.micro_batches.samples)
        if loss.dim():
            raise FastregError(f"curvature: loss_fn must return a scalar mean, got shape {tuple(loss.shape)}")
        return loss

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """The gradient of the loss, or what each micro-batch contributes to it: ``(b_k / B) g_k``."""
        return self._gathered(self._grad([loss], self._asked))

    def hessian(self, loss: Tensor) -> Callable[[Vectors], list[Tensor]]:
        """The product with the Hessian of the loss, or with those of what each micro-batch contributes to it."""
        gradients = self._symbolic(loss, None)
        return lambda vectors: self._gathered(self._derivative(gradients, self._asked, vectors))

    def hessian_gradients(self, loss: Tensor, *, mean: bool) -> list[Tensor]:
        """``sum_k H_k g_k`` or its mean, as half the gradient of ``sum_k ||g_k||^2``; no ``g_k`` is formed."""
        cut = self.micro_batches
        with torch.enable_grad(), self._rerunning():
            squared = squared_norms(self._session, loss, differentiable=True)
            half = squared @ Reduction().factors(cut, squared) / (2 * cut.count if mean else 2)
        return self._gathered(self._grad([half], self._parameters))

    def along_gradients(self, loss: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """``g_k`` and ``H_k g_k`` of every micro-batch, ``[m, *p.shape]``."""
        gradients = self.unweighted(self.gradients(loss))
        return gradients, self.unweighted(self.hessian(loss)(gradients))

    def weighted(self, vectors: Vectors, *, mean: bool) -> list[Tensor]:
        """Vectors such that the sum over what micro-batches contribute is ``sum_k H_k v_k``, or its mean."""
        cut = self.micro_batches
        if mean and not cut.tail:
            return list(vectors)
        factors = self._inverse_shares() / (cut.count if mean else 1)
        return [_by_micro_batch(v, factors) for v in vectors]

    def unweighted(self, found: Vectors) -> list[Tensor]:
        """From what micro-batches contribute to the batch's mean, ``[m, *p.shape]``, to what is their own."""
        return [_by_micro_batch(one, self._inverse_shares()) for one in found]

    def jacobian(self) -> Callable[[Vectors], Tensor]:
        """The product of the outputs' Jacobian with vectors: ``J v``, shaped as the outputs."""
        logits = self.logits()
        # J v is a second derivative of the model, whatever becomes of it.
        refuse_offenders(logits, self._session, self._names)
        seed = torch.zeros_like(logits, requires_grad=True)
        gradients = self._symbolic(logits, seed)

        def product(vectors: Vectors) -> Tensor:
            with self._session.during(Phase.TANGENT):
                (found,) = self._derivative(gradients, [seed], vectors)
            assert found is not None  # the outputs depend on parameters
            return found

        return product

    def pull_back(self, cotangent: Tensor) -> list[Tensor]:
        """``J^T u`` for ``u`` shaped as the outputs."""
        return self._gathered(self._grad([self.logits()], self._asked, [cotangent]))

    def logits(self) -> Tensor:
        """The outputs, or what among them stands for them."""
        logits = first_tensor(self.outputs)
        if logits is None or not logits.is_floating_point() or not logits.requires_grad:
            got = type(self.outputs).__name__ if logits is None else f"{tuple(logits.shape)} {logits.dtype}"
            raise FastregError(f"curvature: the model's outputs must be a tensor that depends on parameters, got {got}")
        return logits

    def _open(self, session: Session) -> None:
        if self._known is not None:
            raise FastregError("curvature: the model must be run on one batch, got forwards of several batch sizes")
        self._known = session
        if self._spread:
            session.leaves = Leaves(session.micro_batches.count, self._parameters, self._apart)

    @property
    def _session(self) -> Session:
        assert self._known is not None
        return self._known

    def _inverse_shares(self) -> Tensor:
        """``B / b_k``, ``[m]``."""
        return self.micro_batches.samples / self.micro_batches.sizes(torch.device("cpu"), torch.float64)

    @property
    def _leaves(self) -> Sequence[Tensor]:
        """What vectors are multiplied with: leaves, or the parameters themselves."""
        leaves = self._session.leaves
        return self._parameters if leaves is None else list(leaves.of.values())

    @property
    def _asked(self) -> Sequence[Tensor]:
        """What results are gradients of."""
        return self._leaves if self._apart else self._parameters

    def _symbolic(self, root: Tensor, seed: Tensor | None) -> list[Tensor | None]:
        with self._rerunning():
            return list(symbolic_gradients(self._session, root, self._leaves, seed))

    def _derivative(
        self, gradients: Sequence[Tensor | None], by: Sequence[Tensor], vectors: Vectors
    ) -> Sequence[Tensor | None]:
        """The gradient of ``sum <gradients, vectors>``; what is constant drops out."""
        pairs = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return [None] * len(by)
        outputs, cotangents = zip(*pairs, strict=True)
        return self._grad(outputs, by, cotangents)

    def _grad(
        self,
        outputs: Sequence[Tensor],
        by: Sequence[Tensor],
        cotangents: Sequence[Tensor | None] = (None,),
    ) -> Sequence[Tensor | None]:
        with self._rerunning():
            return torch.autograd.grad(outputs, by, cotangents, retain_graph=True, allow_unused=True)

    @contextmanager
    def _rerunning(self) -> Iterator[None]:
        """Around every backward: it runs again what is checkpointed, which must be recorded as it was."""
        self._recorder.attach()
        try:
            with buffers_kept(self._model):
                yield
        finally:
            self._recorder.detach()

    def _gathered(self, found: Sequence[Tensor | None]) -> list[Tensor]:
        return [torch.zeros_like(to) if g is None else g for g, to in zip(found, self._asked, strict=True)]


def _by_micro_batch(tensor: Tensor, factors: Tensor) -> Tensor:
    """``[m, ...]`` times ``[m]``."""
    return tensor * factors.to(tensor).view(-1, *(1,) * (tensor.dim() - 1))
