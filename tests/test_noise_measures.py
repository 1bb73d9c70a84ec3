"""Cosines of micro-batch gradients, curvature along a direction, and the load of noise."""

from __future__ import annotations

import warnings

import numpy
import pytest
import torch
from torch.nn import functional as F

from cases import BY_NAME
from fastreg.curvature import Hessian, curvature_along
from fastreg.errors import FastregError
from fastreg.noise import gradient_cosines, stability_load
from fastreg.noise.regression import maximal_lr
from penalty_oracle import MicroBatches


@pytest.mark.parametrize("name", ["mlp_gelu", "tied_padding", "residual_conv", "layer_norm"])
@pytest.mark.parametrize("size", [3, 1])
def test_cosines_are_those_of_the_gradients(name: str, size: int) -> None:
    case = BY_NAME[name]
    batch = case.batch(7)
    cut = MicroBatches(case, case.model(), *batch, size)
    want = F.cosine_similarity(cut.gradients, cut.mean.unsqueeze(0), dim=1).detach()
    model = case.model()
    found = gradient_cosines(model, case.loss_fn, batch, size)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    assert not found.requires_grad and all(p.grad is None for p in model.parameters())


def test_curvature_along_gradient_and_steps() -> None:
    case = BY_NAME["mlp_gelu"]
    batch = case.batch(6)
    cut = MicroBatches(case, case.model(), *batch, 6)
    dense, v = cut.hessian(), torch.stack([cut.mean.detach(), torch.ones(79, dtype=torch.float64)])
    operator = Hessian(case.model(), case.loss_fn, batch)
    found = curvature_along(operator, v.T)
    want = (v @ dense * v).sum(1)
    torch.testing.assert_close(found.quotient, want / v.square().sum(1), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(found.cosine, want / (v.norm(dim=1) * (v @ dense).norm(dim=1)), rtol=1e-9, atol=0.0)
    single = curvature_along(operator, v[0])
    assert single.quotient.shape == () and torch.equal(single.quotient, curvature_along(operator, v[:1].T).quotient)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_the_load_is_one_at_the_largest_stable_rate(size: int, momentum: float) -> None:
    values = numpy.array([1.0, 0.5, 0.5, 0.1])
    largest = maximal_lr(numpy.diag(values), size, momentum)
    eigenvalues = torch.from_numpy(values)
    assert stability_load(eigenvalues, 0.999 * largest, size, momentum) < 1
    with pytest.warns(UserWarning, match="second moments diverge"):
        assert stability_load(eigenvalues, 1.0001 * largest, size, momentum) > 1


def test_many_small_eigenvalues_are_as_good_as_their_sum() -> None:
    top = torch.tensor([1.0])
    many = torch.cat([top, torch.full((100_000,), 2e-5)])
    exact = stability_load(many, 0.3, 4)
    assert stability_load(top, 0.3, 4, rest=2.0) == pytest.approx(exact, rel=1e-4)
    assert exact > stability_load(top, 0.3, 4)


def test_one_eigenvalue_alone_can_be_too_much() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert stability_load(torch.tensor([10.0]), 1.0, 4) == float("inf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([-1.0]), 0.1, 4), "eigenvalues must be"),
        ((torch.ones(1), 0.0, 4), "lr must be > 0, got 0.0"),
        ((torch.ones(1), 0.1, 0), "batch_size must be >= 1, got 0"),
        ((torch.ones(1), 0.1, 4, 1.0), r"momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(FastregError, match=message):
        stability_load(*arguments)
