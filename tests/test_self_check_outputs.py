"""The first step's self-check cuts a micro-batch out of all outputs that the loss is made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastreg
import oracle
from fastreg.errors import FastregError

WEIGHT, SIZE, SAMPLES = 0.7, 2, 6
Outputs = dict[str, Tensor]


class Two(nn.Module):
    """Two heads on a hidden layer; all three are returned, the hidden one first."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.start, self.end = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Outputs:
        hidden = self.body(x).tanh()
        both = torch.cat([self.start(hidden), self.end(hidden)], 1)
        start, end = both.split(3, 1)
        return {"hidden": hidden, "start": start, "end": end, "again": start, "unused": self.end(2 * hidden)}


def of_one(out: Outputs, y: Tensor) -> Tensor:
    return F.cross_entropy(out["start"], y)


def of_both(out: Outputs, y: Tensor) -> Tensor:
    return F.cross_entropy(out["start"], y) + F.cross_entropy(out["end"], 2 - y)


def of_products(out: Outputs, y: Tensor) -> Tensor:
    return F.cross_entropy(out["start"] * out["end"], y)


def coupled(out: Outputs, y: Tensor) -> Tensor:
    return F.cross_entropy(out["start"] * out["end"].mean(0), y)


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Two().double(), torch.randn(SAMPLES, 4, dtype=torch.float64), torch.randint(3, (SAMPLES,))


def explicit(loss_fn: Callable[[Outputs, Tensor], Tensor]) -> oracle.Gradient:
    """Of loss + WEIGHT * R, one double backward per micro-batch."""
    model, x, y = problem()
    total = loss_fn(model(x), y)
    for rows in torch.arange(SAMPLES).split(SIZE):
        own = loss_fn(model(x[rows]), y[rows])
        grads = torch.autograd.grad(own, list(model.parameters()), create_graph=True, allow_unused=True)
        squared = torch.stack([g.square().sum() for g in grads if g is not None]).sum()
        total = total + WEIGHT * squared * SIZE / SAMPLES
    total.backward()
    return oracle.collected_gradient(model)


@pytest.mark.parametrize("passed", [None, "start", "hidden"])
@pytest.mark.parametrize("loss_fn", [of_one, of_both, of_products], ids=lambda f: f.__name__)
def test_every_output_that_the_loss_depends_on(
    loss_fn: Callable[[Outputs, Tensor], Tensor], passed: str | None
) -> None:
    model, x, y = problem()
    reg = fastreg.Regularizer(model, fastreg.GradNorm(WEIGHT), micro_batch_size=SIZE)
    out = model(x)
    reg(loss_fn(out, y), None if passed is None else out[passed]).backward()
    found, wanted = oracle.collected_gradient(model), explicit(loss_fn)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss_fn", [coupled, lambda out, y: of_one(out, y) + out["end"].mean(0).square().sum()])
def test_coupling_in_any_of_them_is_refused(loss_fn: Callable[[Outputs, Tensor], Tensor]) -> None:
    model, x, y = problem()
    reg = fastreg.Regularizer(model, fastreg.GradNorm(WEIGHT), micro_batch_size=SIZE)
    with pytest.raises(FastregError, match="couples samples of different micro-batches"):
        reg(loss_fn(model(x), y))
