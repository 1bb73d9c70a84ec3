"""The first-order pass of the exact penalty: squared norms as the gradient of the probe."""

from __future__ import annotations

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
    # Operations chose their dtypes in the forward: an ambient autocast must not change them here.
    with session.during(Phase.CHAIN), torch.autocast(total.device.type, enabled=False):
        (squared,) = torch.autograd.grad(
            total, session.probe, create_graph=differentiable, retain_graph=True, allow_unused=True
        )
    if squared is None:
        raise FastregError(
            "reg: loss must depend on tracked parameters through the last recorded forward, got one that does not "
            "(was it computed from another model or from an earlier forward?)"
        )
    return squared
