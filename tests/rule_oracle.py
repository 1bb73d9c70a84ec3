"""What every test of a rule compares: a loop over micro-batches in plain PyTorch against the recorded batch.

A model under test maps a batch to one value per sample; the loss is their mean over all B samples, and the gradient
of micro-batch k that of its samples' share of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastreg.recording import Recorder
from fastreg.session import Phase

EXACT = 1e-10


@dataclass(frozen=True)
class Answer:
    """Squared norms [m], the gradient of their sum, and that of the loss, for parameters and inputs in order."""

    norms: Tensor
    penalty: list[Tensor]
    loss: list[Tensor]


class PerSample(nn.Module):
    """The layers, then tanh and the sum of squares of a sample: a curved value for each."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layers(x)).flatten(1).square().sum(1)


@contextmanager
def recorded(net: nn.Module, size: int) -> Iterator[Recorder]:
    """Record the forwards of `net` in micro-batches of `size` samples."""
    recorder = Recorder(net, size, net.parameters(), lambda: True)
    try:
        yield recorder
    finally:
        recorder.remove()


def learned(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Parameters and inputs that require a gradient."""
    return [t for t in (*net.parameters(), x) if t.requires_grad]


def expected(net: nn.Module, x: Tensor, size: int) -> Answer:
    """One micro-batch after another."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    losses = [net(rows).sum() / len(x) for rows in x.split(size)]
    norms = [_square(_grad(loss, parameters, create_graph=True)) for loss in losses]
    everything = learned(net, x)
    return Answer(torch.stack(norms).detach(), _grad(sum(norms), everything), _grad(sum(losses), everything))


def received(net: nn.Module, x: Tensor, size: int) -> Answer:
    """The whole batch, recorded."""
    everything = learned(net, x)
    with recorded(net, size) as recorder:
        loss = net(x).mean()
        session = recorder.session
        with session.during(Phase.CHAIN):
            (norms,) = torch.autograd.grad(loss, session.probe, create_graph=True)
        penalty = _grad(norms.sum(), everything)
        return Answer(norms.detach(), penalty, _grad(loss, everything))


def statistics(net: nn.Module, x: Tensor, size: int) -> tuple[Tensor, list[Tensor]]:
    """Squared norms and parameter gradients of one backward in the statistics phase."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    with recorded(net, size) as recorder:
        loss = net(x).mean()
        session = recorder.session
        with session.during(Phase.STATISTICS):
            norms, *gradients = torch.autograd.grad(loss, [session.probe, *parameters])
    return norms, gradients


def double_backward(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradient of the squared norm of all gradients, by differentiating twice with nothing in between."""
    everything = learned(net, x)
    return _grad(_square(_grad(net(x).mean(), everything, create_graph=True)), everything)


def assert_same(got: Answer, want: Answer, tolerance: float = EXACT) -> None:
    """Norms and both gradients agree."""
    assert_close([got.norms], [want.norms], tolerance)
    assert_close(got.penalty, want.penalty, tolerance)
    assert_close(got.loss, want.loss, tolerance)


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float = EXACT) -> None:
    """Each tensor agrees relative to its norm, or to a thousandth of all of them where it is nearly zero."""
    assert len(got) == len(want)
    floor = 1e-3 * float(torch.stack([w.norm() for w in want]).norm())
    for g, w in zip(got, want):
        assert g.shape == w.shape
        assert float((g.to(w.dtype) - w).norm()) <= tolerance * max(float(w.norm()), floor)


def check_exact(net: nn.Module, x: Tensor, size: int) -> None:
    """Norms and gradients are those of the loop."""
    assert_same(received(net, x, size), expected(net, x, size))


def check_statistics(net: nn.Module, x: Tensor, size: int) -> None:
    """Norms and gradients of the loss come from one backward."""
    want = expected(net, x, size)
    norms, gradients = statistics(net, x, size)
    assert_close([norms], [want.norms])
    assert_close(gradients, want.loss)


def check_twice_differentiable(net: nn.Module, x: Tensor) -> None:
    """Recorded operations differentiate twice without the norms too, as the numerical self-check does it."""
    want = double_backward(net, x)
    with recorded(net, len(x)):
        assert_close(double_backward(net, x), want)


def check_float32(net: nn.Module, x: Tensor, margin: float = 1) -> None:
    """A float32 run is as good as float32 arithmetic lets a plain one be, within the margin."""
    want, bound = expected(net, x, 2), margin * single_precision_error(net, x)
    assert_same(received(net.float(), x.float(), 2), want, bound)


def single_precision_error(net: nn.Module, x: Tensor) -> float:
    """A bound on the relative error of a float32 run: four sums in a row, of up to n products of random sign each."""
    longest = max(x.numel(), *(p.numel() for p in net.parameters()))
    return 8 * 4 * longest**0.5 * torch.finfo(torch.float32).eps


def _grad(value: Tensor, of: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Gradients, zeros where there is no dependence; the graph is kept."""
    found = torch.autograd.grad(value, of, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(of, found)]


def _square(gradients: Sequence[Tensor]) -> Tensor:
    return torch.stack([g.square().sum() for g in gradients]).sum()
