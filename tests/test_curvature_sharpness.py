"""Sharpness against the step size: on a quadratic with known eigenvalues, and against a loop over micro-batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import BY_NAME, square
from curvature_oracle import pieces
from fastreg.curvature import Hessian, SharpnessMargin, batch_sharpness, gradient_curvatures, sharpness_margin
from fastreg.errors import FastregError

EXACT = 1e-10
EIGENVALUES = torch.tensor([0.5, 1.0, 3.0, 8.0], dtype=torch.float64)


def quadratic() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A linear layer on data such that the mean squared error has these eigenvalues, and its minimum at 0."""
    basis = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    inputs = (2 * EIGENVALUES).sqrt().unsqueeze(1) * basis
    return nn.Linear(4, 1, bias=False).double(), (inputs, inputs.new_zeros(4, 1))


def margin(lr: float, momentum: float = 0.0) -> SharpnessMargin:
    model, batch = quadratic()
    return sharpness_margin(Hessian(model, F.mse_loss, batch), lr, momentum=momentum)


@pytest.mark.parametrize(("momentum", "threshold"), [(0.0, 20.0), (0.5, 30.0), (0.9, 38.0)])
def test_a_quadratic_against_its_threshold(momentum: float, threshold: float) -> None:
    found = margin(0.1, momentum)
    torch.testing.assert_close(found.sharpness, EIGENVALUES[-1], rtol=EXACT, atol=0)
    assert found.threshold == pytest.approx(threshold, rel=1e-14)
    assert float(found.margin) == pytest.approx(threshold - 8, rel=EXACT)
    assert float(found.ratio) == pytest.approx(8 / threshold, rel=EXACT)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("ratio", [0.3, 0.97, 1.03, 2.0])
def test_gradient_descent_diverges_where_the_ratio_is_above_one(ratio: float, momentum: float) -> None:
    lr = ratio * 2 * (1 + momentum) / 8
    model, (inputs, targets) = quadratic()
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum)
    for _ in range(300):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    diverged = bool(model.weight.norm() > 2)
    assert diverged == bool(margin(lr, momentum).ratio > 1) == (ratio > 1)


@pytest.mark.parametrize("lr", [0, -0.1, True, "0.1", float("nan"), float("inf"), None])
def test_refused_learning_rates(lr: object) -> None:
    with pytest.raises(FastregError, match="sharpness_margin: lr must be a number > 0, got"):
        margin(lr)


@pytest.mark.parametrize("momentum", [-0.1, 1, 1.5, float("nan")])
def test_refused_momenta(momentum: float) -> None:
    with pytest.raises(FastregError, match=r"sharpness_margin: momentum must be in \[0, 1\), got"):
        margin(0.1, momentum)


@pytest.mark.parametrize("size", [2, 3, 7], ids=lambda size: f"by{size}")
@pytest.mark.parametrize("name", ["mlp_gelu", "gpt_tied", "residual_conv", "conv2d_grouped", "transformer_encoder"])
def test_micro_batches_as_one_after_another(name: str, size: int) -> None:
    """Seven samples: the last micro-batch of two and of three holds one."""
    case, curvatures, squared = BY_NAME[name], [], []
    for piece in pieces(case, 7, size):
        gradient = piece.gradient()
        curvatures.append(gradient @ piece.hessian_product(gradient))
        squared.append(gradient @ gradient)
    want = torch.stack([torch.stack(curvatures), torch.stack(squared)])
    got = torch.stack(gradient_curvatures(case.model(), case.loss_fn, case.batch(7), size))
    torch.testing.assert_close(got, want, rtol=EXACT, atol=float(EXACT * want.abs().max()))
    sharpness = batch_sharpness(case.model(), case.loss_fn, case.batch(7), size)
    torch.testing.assert_close(sharpness, (want[0] / want[1]).mean(), rtol=EXACT, atol=0)


def test_some_parameters_alone() -> None:
    case, rows, wanted = BY_NAME["mlp_gelu"], slice(-3, None), []
    for piece in pieces(case, 7, 3):
        gradient = torch.zeros_like(piece.gradient())
        gradient[rows] = piece.gradient()[rows]
        wanted.append(gradient @ piece.hessian_product(gradient))
    model = case.model()
    got, _ = gradient_curvatures(model, case.loss_fn, case.batch(7), 3, parameters=[model[4].bias])
    torch.testing.assert_close(got, torch.stack(wanted), rtol=EXACT, atol=0)


def test_a_micro_batch_without_gradient_counts_as_flat() -> None:
    model = nn.Linear(3, 2, bias=False).double()
    inputs, targets = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    inputs[2:4] = 0
    loss_fn = lambda outputs, targets: square(outputs, targets).mean()  # noqa: E731
    curvatures, squared = gradient_curvatures(model, loss_fn, (inputs, targets), 2)
    assert (squared == 0).tolist() == [False, True, False] and curvatures[1] == 0
    want = (curvatures[0] / squared[0] + curvatures[2] / squared[2]) / 3
    torch.testing.assert_close(batch_sharpness(model, loss_fn, (inputs, targets), 2), want)
    assert batch_sharpness(model, loss_fn, (torch.zeros_like(inputs), targets), 2) == 0


@pytest.mark.parametrize("size", [0, True, 1.5])
def test_refused_micro_batch_sizes(size: object) -> None:
    case = BY_NAME["mlp_gelu"]
    model = case.model()
    with pytest.raises(FastregError, match=f"micro_batch_size must be an integer >= 1 or None, got {size!r}"):
        batch_sharpness(model, case.loss_fn, case.batch(4), size)
    assert not any(module._forward_hooks for module in model.modules())
