"""The first-order pass of the exact penalty: squared norms as the gradient of the probe."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.session import Phase, Session


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
    earlier = [known for ref in session.earlier if (known := ref()) is not None]
    with ExitStack() as stack:
        for one in (session, *earlier):
            stack.enter_context(one.during(Phase.CHAIN))
        # Operations chose their dtypes in the forward: an ambient autocast must not change them here.
        stack.enter_context(torch.autocast(total.device.type, enabled=False))
        squared, *others = torch.autograd.grad(
            total,
            [session.probe, *(one.probe for one in earlier)],
            create_graph=differentiable,
            retain_graph=True,
            allow_unused=True,
        )
    if squared is None:
        raise FastregError(
            "reg: loss must depend on tracked parameters through the last recorded forward, got one that does not "
            "(was it computed from another model or from an earlier forward?)"
        )
    if any(other is not None for other in others):
        raise FastregError(
            "reg: the loss must depend on forwards of one batch size, got several (call reg once per forward, or use "
            "the same batch size for all)"
        )
    return squared
