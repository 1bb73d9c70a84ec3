"""How far micro-batch gradients agree with each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastreg.chain import norms_and_gradients
from fastreg.curvature.linearization import Batch, LossFunction
from fastreg.errors import FastregError
from fastreg.loss import check_loss
from fastreg.stats import recorded


def gradient_cosines(model: nn.Module, loss_fn: LossFunction, batch: Batch, micro_batch_size: int) -> Tensor:
    r"""Cosines between micro-batch gradients and the gradient of the batch.

        cos_k = <g_k, g> / (||g_k|| ||g||),      g = sum_k w_k g_k the batch's gradient,  w_k = b_k / B

    1 where a micro-batch pulls as the batch does; ``1 / sqrt(m)`` on average where the ``g_k`` are orthogonal and of
    one length. Exact, in two passes of a recorded forward: one for g and the norms, one for the products; each
    parameter's micro-batch gradients are formed, one parameter after the other.

    Args:
        model, loss_fn, batch, micro_batch_size: as for :func:`fastreg.micro_batch_grad_norms`.

    Returns:
        ``[m]``; NaN where a gradient is 0.

    Raises:
        FastregError: as :func:`fastreg.micro_batch_grad_norms`.

    Example:
        >>> import torch
        >>> from fastreg.noise import gradient_cosines
        >>> model, batch = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> gradient_cosines(model, torch.nn.functional.cross_entropy, batch, 4).shape
        torch.Size([2])
    """
    with recorded(model, micro_batch_size) as recorder:
        recorder.on_open = lambda session: session.project(1)
        loss = loss_fn(model(batch[0]), batch[1])
        session = recorder.last
        check_loss(loss, session.micro_batches.samples)
        if loss.dim():
            raise FastregError(f"gradient_cosines: loss_fn must return a scalar mean, got shape {tuple(loss.shape)}")
        tracked = [p for p in recorder.parameters if p.requires_grad]
        mean = torch.autograd.grad(loss, tracked, retain_graph=True, allow_unused=True)
        pairs = [(id(p), g) for p, g in zip(tracked, mean, strict=True) if g is not None]
        assert session.frame is not None
        vectors = {key: g.detach().to(session.probe.dtype).unsqueeze(0) for key, g in pairs}
        session.frame.vectors = vectors
        found = norms_and_gradients(session, loss, ())
        length = torch.stack([v.square().sum() for v in vectors.values()]).sum().sqrt()
        # Shares of micro-batches in the loss multiply products and norms alike.
        assert found.projected is not None
        return (found.projected.squeeze(1) / (found.squared.sqrt() * length)).detach()
