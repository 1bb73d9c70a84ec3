"""One model under fastreg against the oracle: squared norms, penalised gradients, gradients with statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastreg
import oracle
from fastreg.recording import Recorder
from fastreg.session import Phase

WEIGHT = 0.7
EXACT = 1e-10


def penalised(model: nn.Module, x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``||g_k||^2 [m]``, and the gradient of ``C + WEIGHT R`` for what is trained, flat: plain torch."""
    with sdpa_kernel(SDPBackend.MATH):
        losses, n = oracle.micro_batch_losses(model, F.cross_entropy, x, y, size)
        grads = [oracle.gradient_of(loss, oracle.trainable(model), create_graph=True) for loss in losses]
        squares = torch.stack([sum(g.square().sum() for g in of.values()) for of in grads])
        loss = torch.stack(losses) @ n.to(losses[0].dtype) / n.sum()
        return squares.detach(), flat_gradient(loss + WEIGHT * squares.mean(), model, x)


def regularized(model: nn.Module, x: Tensor, y: Tensor, size: int, check: bool = False) -> tuple[Tensor, Tensor]:
    """The same by fastreg."""
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=size, check=check)
    outputs = model(x)
    gradient = flat_gradient(reg(F.cross_entropy(outputs, y), outputs), model, x)
    reg.remove()
    return reg.sq_norms, gradient


def with_statistics(model: nn.Module, x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``||g_k||^2 [m]`` that rode on a backward, and that backward's gradient, flat."""
    recorder = Recorder(model, size, model.parameters(), lambda: True)
    loss, session = F.cross_entropy(model(x), y), recorder.session
    with session.during(Phase.STATISTICS):
        gradients = torch.autograd.grad(loss, [*trained(model, x), session.probe])
    recorder.remove()
    parts = session.micro_batches.sizes(x.device, session.probe.dtype) / len(y)
    return gradients[-1] / parts.square(), torch.cat([g.flatten() for g in gradients[:-1]])


def check_exact(model: nn.Module, x: Tensor, y: Tensor, size: int, check: bool = False) -> None:
    """Norms and penalised gradient are those of plain torch."""
    want_norms, want = penalised(model, x, y, size)
    norms, gradient = regularized(model, x, y, size, check)
    assert error(norms, want_norms) < EXACT
    assert error(gradient, want) < EXACT


def check_statistics(model: nn.Module, x: Tensor, y: Tensor, size: int) -> None:
    """Norms that ride on a backward are those of plain torch, and leave its gradient alone."""
    want_norms, _ = penalised(model, x, y, size)
    norms, gradient = with_statistics(model, x, y, size)
    assert error(norms, want_norms) < EXACT
    assert error(gradient, flat_gradient(F.cross_entropy(model(x), y), model, x)) < EXACT


def flat_gradient(loss: Tensor, model: nn.Module, x: Tensor) -> Tensor:
    """The gradient for parameters and input that require one."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained(model, x))])


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Parameters and input that require a gradient."""
    return [*oracle.trainable(model).values(), *([x] if x.requires_grad else [])]


def error(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||``."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())
