"""Statistics of gradients: squared norms of micro-batch and per-sample gradients, the Fisher trace.

Functions take ``(model, loss_fn, batch)`` with ``batch = (inputs, targets)`` and ``loss_fn(outputs, targets)`` the
mean loss over samples. They run the model in its current mode and leave its gradients alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreg.attach import check_model
from fastreg.chain import squared_norms
from fastreg.errors import FastregError
from fastreg.loss import Reduction, check_loss, first_tensor
from fastreg.penalties.fisher_trace import sample_labels
from fastreg.recording import Recorder
from fastreg.session import Phase

LossFunction = Callable[[Any, Tensor], Tensor]
# Inputs, as the model is called with, and targets.
Batch = tuple[Any, Tensor]
FISHER_KINDS = ("sampled", "empirical", "exact")


@overload
def micro_batch_grad_norms(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    micro_batch_size: int,
    *,
    per_parameter: Literal[False] = False,
) -> Tensor: ...


@overload
def micro_batch_grad_norms(
    model: nn.Module, loss_fn: LossFunction, batch: Batch, micro_batch_size: int, *, per_parameter: Literal[True]
) -> dict[str, Tensor]: ...


def micro_batch_grad_norms(
    model: nn.Module, loss_fn: LossFunction, batch: Batch, micro_batch_size: int, *, per_parameter: bool = False
) -> Tensor | dict[str, Tensor]:
    """Squared norms ``||g_k||^2`` of micro-batch gradients, without forming any gradient.

        g_k = grad (1/b) sum_{i in k} l_i,      m = ceil(B / b) consecutive micro-batches

    Args:
        model: its tracked parameters are those that require grad.
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss over samples, scalar.
        batch: ``(inputs, targets)``, each ``[B, ...]``.
        micro_batch_size: b, at least 1.
        per_parameter: return ``{name: [m]}`` instead of the sum over parameters.

    Returns:
        ``[m]`` squared norms, or a dict of them.

    Raises:
        FastregError: as :class:`fastreg.Regularizer`.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> fastreg.micro_batch_grad_norms(model, torch.nn.functional.cross_entropy, batch, 4).shape
        torch.Size([2])
    """
    if isinstance(micro_batch_size, bool) or not isinstance(micro_batch_size, int) or micro_batch_size < 1:
        raise FastregError(
            f"micro_batch_grad_norms: micro_batch_size must be an integer >= 1, got {micro_batch_size!r}"
        )
    with recorded(model, micro_batch_size) as recorder:
        loss = loss_fn(model(batch[0]), batch[1])
        session = recorder.last
        check_loss(loss, session.micro_batches.samples)
        if loss.dim():
            raise FastregError(f"stats: loss_fn must return a scalar mean, got shape {tuple(loss.shape)}")
        found: dict[int, Tensor] = {}
        session.per_parameter = found if per_parameter else None
        squared = squared_norms(session, loss, differentiable=False)
        factors = Reduction().factors(session.micro_batches, squared)
        if not per_parameter:
            return squared * factors
        zero = torch.zeros_like(squared)
        tracked = [p for p in recorder.parameters if p.requires_grad]
        return {recorder.names[id(p)]: found.get(id(p), zero) * factors for p in tracked}


@overload
def per_sample_grad_norms(
    model: nn.Module, loss_fn: LossFunction, batch: Batch, *, per_parameter: Literal[False] = False
) -> Tensor: ...


@overload
def per_sample_grad_norms(
    model: nn.Module, loss_fn: LossFunction, batch: Batch, *, per_parameter: Literal[True]
) -> dict[str, Tensor]: ...


def per_sample_grad_norms(
    model: nn.Module, loss_fn: LossFunction, batch: Batch, *, per_parameter: bool = False
) -> Tensor | dict[str, Tensor]:
    """Squared norms ``[B]`` of per-sample gradients: :func:`micro_batch_grad_norms` with micro-batches of one.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> fastreg.per_sample_grad_norms(model, torch.nn.functional.cross_entropy, batch).shape
        torch.Size([8])
    """
    if per_parameter:
        return micro_batch_grad_norms(model, loss_fn, batch, 1, per_parameter=True)
    return micro_batch_grad_norms(model, loss_fn, batch, 1)


def fisher_trace(
    model: nn.Module,
    loss_fn: LossFunction | None,
    batch: Batch,
    *,
    kind: str = "sampled",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The trace of the Fisher information of the model's softmax, averaged over the batch.

        tr F = (1/B) sum_i E_{y ~ p(.|x_i)} ||grad -log p(y|x_i)||^2

    ``sampled`` draws one label per sample (unbiased), ``exact`` sums over all C classes (C backward passes through
    one forward), ``empirical`` uses the batch's own targets and ``loss_fn`` (the empirical Fisher, a different
    quantity unless the labels follow the model).

    Args:
        loss_fn: used by ``empirical`` only; may be None otherwise.
        batch: ``(inputs, targets)``; the model's outputs are logits ``[B, C]``.
        kind: one of the three.
        generator: of the label draw; torch's global one by default.

    Returns:
        A 0-d tensor.

    Raises:
        FastregError: unknown kind, or outputs that are not logits ``[B, C]``.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> float(fastreg.fisher_trace(model, None, batch, kind="exact")) > 0
        True
    """
    if kind not in FISHER_KINDS:
        raise FastregError(f"fisher_trace: kind must be one of {FISHER_KINDS}, got {kind!r}")
    if kind == "empirical":
        if loss_fn is None:
            raise FastregError("fisher_trace: loss_fn must be given for kind='empirical', got None")
        return per_sample_grad_norms(model, loss_fn, batch).mean()
    with recorded(model, 1) as recorder:
        logits = first_tensor(model(batch[0]))
        if logits is None or logits.dim() != 2 or not logits.is_floating_point():
            got = None if logits is None else tuple(logits.shape)
            raise FastregError(f"fisher_trace: the model's outputs must be logits [B, C], got {got}")
        if kind == "sampled":
            labels = sample_labels(logits.detach(), generator)
            total = F.cross_entropy(logits, labels, reduction="sum")
            return squared_norms(recorder.last, total, differentiable=False).mean()
        log_p = logits.log_softmax(-1)
        of_class = [squared_norms(recorder.last, -column.sum(), differentiable=False) for column in log_p.unbind(1)]
        return (log_p.detach().exp() * torch.stack(of_class, 1)).sum(1).mean()


class RidingNorms:
    """Squared micro-batch gradient norms that ride on the training backward, with no second pass.

    Attach once; after each ``loss.backward()`` :meth:`read` returns ``||g_k||^2`` of that backward. Parameter
    gradients are what they were without it, up to rounding.

    Args:
        model: recorded while gradients are enabled.
        micro_batch_size: b; 1 for per-sample norms.

    Example:
        >>> import torch
        >>> from fastreg.stats import RidingNorms
        >>> model = torch.nn.Linear(3, 2)
        >>> with RidingNorms(model, micro_batch_size=1) as norms:
        ...     torch.nn.functional.cross_entropy(model(torch.randn(8, 3)), torch.randint(2, (8,))).backward()
        ...     norms.read().shape
        torch.Size([8])
    """

    def __init__(self, model: nn.Module, micro_batch_size: int = 1) -> None:
        check_model(model)
        self._recorder = Recorder(
            model, micro_batch_size, model.parameters(), lambda: True, phase=Phase.STATISTICS
        )

    def read(self, *, reduction: str = "mean", scale: float = 1.0, counts: Tensor | None = None) -> Tensor:
        """``||g_k||^2``, ``[m]``, of the last backward; arguments describe its loss as for ``Regularizer``.

        Raises:
            FastregError: no backward of a recorded forward has run.
        """
        session = self._recorder.session
        if session is None or session.probe.grad is None:
            raise FastregError("RidingNorms.read: a recorded forward and its backward must have run, got none")
        squared = session.probe.grad
        session.consumed = True
        return squared * Reduction(reduction, scale, counts).factors(session.micro_batches, squared)

    def remove(self) -> None:
        """Detach from the model."""
        self._recorder.remove()

    def __enter__(self) -> RidingNorms:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


@contextmanager
def recorded(model: nn.Module, micro_batch_size: int) -> Iterator[Recorder]:
    """A recorder on the model, in its current mode, for the length of a block."""
    check_model(model)
    recorder = Recorder(model, micro_batch_size, model.parameters(), lambda: True)
    try:
        with torch.enable_grad():
            yield recorder
    finally:
        recorder.remove()
