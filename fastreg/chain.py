"""First passes through a recorded graph whose results will be differentiated again.

The d-chain: squared norms as the gradient of the probe. With it, where they are asked for, projections of micro-batch
gradients on a frame, and the gradient itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.session import Phase, Session


class Found(NamedTuple):
    """What a first pass leaves, about the rows of ``grad total`` that belong to each micro-batch.

    Attributes:
        squared: their squared norms, ``[m]``.
        projected: their products with the session's frame, ``[m, r]``; None without a frame.
        gradients: ``grad total`` by each parameter asked for; None where it does not depend on it.
    """

    squared: Tensor
    projected: Tensor | None
    gradients: list[Tensor | None]


def squared_norms(session: Session, total: Tensor, *, differentiable: bool) -> Tensor:
    """Squared norms ``[m]`` of the rows of ``grad total`` that belong to each micro-batch.

    One pass of input gradients through the recorded graph (the d-chain); no parameter gradient is formed.

    Args:
        session: the recorded forward that ``total`` depends on.
        total: scalar, a sum of per-sample terms.
        differentiable: whether the norms will be differentiated.

    Raises:
        FastregError: ``total`` does not depend on the recorded forward.
    """
    return _first_pass(session, total, Phase.CHAIN, (), differentiable).squared


def norms_and_gradients(session: Session, total: Tensor, parameters: Sequence[Tensor]) -> Found:
    """As :func:`squared_norms`, and the gradient by the parameters from the same pass; all differentiable.

    Norms of some micro-batches alone take a pass of their own, which costs less than those of all.
    """
    if session.selected is None:
        return _first_pass(session, total, Phase.STATISTICS, parameters, True)
    found = _first_pass(session, total, Phase.CHAIN, (), True)
    with session.during(Phase.PLAIN), _own_dtypes(total):
        gradients = torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True)
    return found._replace(gradients=list(gradients))


def symbolic_gradients(
    session: Session, root: Tensor, by: Sequence[Tensor], seed: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Zeros in the place of the gradients of ``root``, with a graph: differentiated along ``v`` they give ``H v``."""
    with session.during(Phase.SYMBOLIC), _own_dtypes(root):
        return torch.autograd.grad(root, by, seed, create_graph=True, retain_graph=True, allow_unused=True)


def _first_pass(
    session: Session, total: Tensor, phase: Phase, parameters: Sequence[Tensor], differentiable: bool
) -> Found:
    earlier = [known for ref in session.earlier if (known := ref()) is not None]
    frame = [] if session.frame is None else [session.frame.probe]
    with ExitStack() as stack:
        for one in (session, *earlier):
            stack.enter_context(one.during(phase))
        stack.enter_context(_own_dtypes(total))
        found = torch.autograd.grad(
            total,
            [session.probe, *frame, *(one.probe for one in earlier), *parameters],
            create_graph=differentiable,
            retain_graph=True,
            allow_unused=True,
        )
    squared, projected, others = found[0], found[1] if frame else None, found[1 + len(frame) :]
    _check_probes(squared, others[: len(earlier)])
    return Found(squared, projected, list(others[len(earlier) :]))


def _check_probes(squared: Tensor | None, others: Sequence[Tensor | None]) -> None:
    if squared is None:
        raise FastregError(
            "reg: loss must depend on tracked parameters through the last recorded forward, got one that does not "
            "(was it computed from another model, from an earlier forward, or by torch.compile, for which there is "
            "fastreg.compile?)"
        )
    if any(other is not None for other in others):
        raise FastregError(
            "reg: the loss must depend on forwards of one batch size, got several (call reg once per forward, or use "
            "the same batch size for all)"
        )


@contextmanager
def _own_dtypes(root: Tensor) -> Iterator[None]:
    """Operations chose their dtypes in the forward: an ambient autocast must not change them in a pass of ours."""
    with torch.autocast(root.device.type, enabled=False):
        yield
