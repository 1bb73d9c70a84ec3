"""The oracle itself, against formulas worked out by hand and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import oracle
from cases import BY_NAME, CASES, Case

WEIGHT = 0.3


def least_squares(samples: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """Linear regression without bias, data, targets."""
    torch.manual_seed(2)
    model = nn.Linear(4, 1, bias=False).double()
    return model, torch.randn(samples, 4).double(), torch.randn(samples, 1).double()


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().mean()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 6, 7])
def test_least_squares_by_hand(micro_batch_size: int) -> None:
    """g_k = X_k'(X_k w - y_k)/b_k, H_k = X_k'X_k/b_k, gradient g + (2 weight/m) sum_k H_k g_k."""
    model, x, y = least_squares(6)
    w = model.weight.detach()[0]
    gradients, products = [], []
    for piece in oracle.cut(6, micro_batch_size):
        rows, error = x[piece], x[piece] @ w - y[piece, 0]
        gradients.append(rows.T @ error / len(rows))
        products.append(rows.T @ (rows @ gradients[-1]) / len(rows))
    full = x.T @ (x @ w - y[:, 0]) / 6
    want = full + 2 * WEIGHT * torch.stack(products).mean(0)

    got = oracle.penalty_gradient(model, half_square, x, y, micro_batch_size, weight=WEIGHT)
    norms = oracle.sq_norms(model, half_square, x, y, micro_batch_size)
    torch.testing.assert_close(got["weight"][0], want, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(norms, torch.stack([g @ g for g in gradients]), rtol=1e-13, atol=1e-14)


def test_sum_reduction_multiplies_the_loss_alone() -> None:
    model, x, y = least_squares(6)
    mean = oracle.penalty_gradient(model, half_square, x, y, 4, weight=WEIGHT)["weight"]
    total = oracle.penalty_gradient(model, half_square, x, y, 4, weight=WEIGHT, reduction="sum")["weight"]
    plain = oracle.penalty_gradient(model, half_square, x, y, 4, weight=0.0)["weight"]
    torch.testing.assert_close(total - mean, 5 * plain, rtol=1e-13, atol=1e-14)


def test_counts_weight_the_micro_batches() -> None:
    """Losses that are means over tokens: C is the mean over all tokens, not the mean of C_k."""
    model, x, y = least_squares(6)
    counts = torch.tensor([3, 1, 2, 5, 1, 4])
    scaled = counts.double().sqrt()[:, None]

    def token_mean(outputs: Tensor, targets: Tensor) -> Tensor:
        """`targets` holds the target and the count of each sample."""
        return (targets[:, 1] * (outputs[:, 0] - targets[:, 0]).square()).sum() / targets[:, 1].sum()

    got = oracle.penalty_gradient(
        model, token_mean, x, torch.cat([y, counts[:, None].double()], 1), 4, weight=0.0, counts=counts
    )
    rows, values = scaled * x, scaled * y
    want = 2 * rows.T @ (rows @ model.weight.detach().T - values) / counts.sum()
    torch.testing.assert_close(got["weight"], want.T, rtol=1e-13, atol=1e-14)


def test_exact_fisher_trace_of_softmax_regression() -> None:
    """For logits W x: tr F = mean_i ||x_i||^2 (1 - sum_c p_ic^2)."""
    torch.manual_seed(3)
    model, x = nn.Linear(4, 3, bias=False).double(), torch.randn(5, 4).double()
    p = model(x).softmax(-1)
    want = (x.square().sum(1) * (1 - p.square().sum(1))).mean()
    torch.testing.assert_close(oracle.exact_fisher_trace(model, x), want.detach(), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_finite_differences(case: Case) -> None:
    """The directional derivative of C + weight R, central difference."""
    model, (x, y) = case.model(), case.batch(5)
    parameters, size = oracle.trainable(model), 3
    torch.manual_seed(4)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    if case.name in ("embedding_padding", "tied_padding"):
        # By definition an embedding's padding row has no gradient, although the loss depends on it.
        direction["embedding.weight"][0] = 0.0

    def objective(step: float) -> float:
        with torch.no_grad():
            for name, p in parameters.items():
                p.add_(direction[name], alpha=step)
        with oracle.sdpa_kernel(oracle.SDPBackend.MATH):
            losses, n = oracle.micro_batch_losses(model, case.loss_fn, x, y, size)
            value = torch.stack(losses) @ n / n.sum() + WEIGHT * oracle.penalty_value(losses, parameters)
        with torch.no_grad():
            for name, p in parameters.items():
                p.sub_(direction[name], alpha=step)
        return value.item()

    epsilon = 1e-5
    want = (objective(epsilon) - objective(-epsilon)) / (2 * epsilon)
    grads = oracle.penalty_gradient(model, case.loss_fn, x, y, size, weight=WEIGHT)
    got = sum((grads[name] * direction[name]).sum().item() for name in grads)
    assert got == pytest.approx(want, rel=1e-5)


def test_errors_see_a_wrong_parameter() -> None:
    """The measures used by every exactness test do notice one wrong entry."""
    case = BY_NAME["mlp_relu"]
    model, (x, y) = case.model(), case.batch(5)
    want = oracle.penalty_gradient(model, case.loss_fn, x, y, 2)
    got = {name: g.clone() for name, g in want.items()}
    got["2.bias"][1] *= 1 + 1e-6
    assert oracle.relative_error(want, want) == 0.0
    assert oracle.relative_error(got, want) > 1e-9
    assert max(oracle.parameter_errors(got, want), key=oracle.parameter_errors(got, want).get) == "2.bias"
