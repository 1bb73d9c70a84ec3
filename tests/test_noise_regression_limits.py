"""Limits of the closed forms of SGD on regression: small rates, large batches, finite data, other models; errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastreg.errors import FastregError
from fastreg.noise import regression
from fastreg.noise.regression import (
    natural_gradient,
    near_minimum,
    noise_near_minimum,
    overparametrised,
    residual_variance,
    stationary,
)
from regression_oracle import Recursion, definite, lyapunov

MOMENTA = pytest.mark.parametrize("momentum", [0.0, 0.5])


def slope(x: np.ndarray, y: list[float]) -> float:
    return np.polyfit(np.log(x), np.log(y), 1)[0]


@MOMENTA
def test_the_small_rate_limit_is_off_at_first_order(momentum: float) -> None:
    A, S, rates = definite(3, 0), 4, np.array([1e-2, 5e-3, 2.5e-3])
    exact = [stationary(A, lr, S, 1.0, momentum).covariance / (lr / (2 * S * (1 - momentum))) for lr in rates]
    assert slope(rates, [np.linalg.norm(ratio - np.eye(3)) for ratio in exact]) == pytest.approx(1, abs=0.15)
    assert all((np.linalg.eigvalsh(ratio) > 1).all() for ratio in exact)


def test_theorem_3_splits_the_noise_by_powers_of_the_batch_size() -> None:
    A, S, lr = definite(3, 1), 5, 0.2
    found = stationary(A, lr, S, 0.7)
    G = 2 * np.eye(3) - (1 + 1 / S) * lr * A
    growth = (1 + found.kappa / S) * (lr * A @ np.linalg.inv(G) + found.trace * np.eye(3)) @ A
    np.testing.assert_allclose(found.noise, 0.7 / S * A + 0.7 / S**2 * growth, rtol=1e-12, atol=1e-14)


def test_fluctuations_leave_the_scaling_with_one_over_s_at_second_order() -> None:
    A, lr, sizes = definite(3, 2), 0.1, np.array([64, 128, 256, 512])
    limit = 10**7 * Recursion(A, lr, 10**7, 1.0).fixed_point()[1]
    found = [stationary(A, lr, int(S), 1.0).covariance for S in sizes]
    naive = [np.linalg.norm(covariance) for covariance in found]
    rest = [np.linalg.norm(covariance - limit / S) for covariance, S in zip(found, sizes)]
    assert slope(sizes, naive) == pytest.approx(-1, abs=0.15)
    assert slope(sizes, rest) == pytest.approx(-2, abs=0.15)


@pytest.mark.parametrize("start", [1e-3, 1e-2])
def test_rate_and_batch_scaled_together_do_not_keep_the_fluctuations(start: float) -> None:
    A, S = definite(3, 3), 32
    one, four = stationary(A, start, S, 1.0).test_loss, stationary(A, 4 * start, 4 * S, 1.0).test_loss
    exact = [np.trace(A @ Recursion(A, k * start, k * S, 1.0).fixed_point()[1]) / 2 for k in (1, 4)]
    np.testing.assert_allclose(four / one - 1, exact[1] / exact[0] - 1, rtol=1e-7)
    # 1 / (2 - lr a) alone, the part without S, moves by 3 lr a / 2; it dominates for lr a S > D.
    expected = 1.5 * start * np.trace(A @ A) / np.trace(A)
    assert four / one - 1 == pytest.approx(expected, rel=0.1)


def finite_data(x: np.ndarray, e: np.ndarray, lr: float, S: int, mu: float, start: np.ndarray) -> np.ndarray:
    """Covariance of w after 700 steps of S of the given samples, with replacement, from covariance ``start``."""
    A, size = x.T @ x / len(x), x.shape[1]
    one = np.eye(size)
    F, P = np.block([[one - lr * A, -mu * lr * one], [A, mu * one]]), np.vstack([-lr * one, one])
    moments = np.zeros((2 * size, 2 * size))
    moments[:size, :size] = start
    for _ in range(700):
        covariance = moments[:size, :size]
        squared = np.einsum("ni,ni->n", x @ covariance, x) + e**2
        noise = ((x.T * squared) @ x / len(x) - A @ covariance @ A) / S
        moments = F @ moments @ F.T + P @ noise @ P.T
    return moments[:size, :size]


@MOMENTA
@pytest.mark.parametrize(("samples", "size"), [(200, 60), (140, 70)])
def test_finite_data_agree_within_a_few_percent(momentum: float, samples: int, size: int) -> None:
    rng = np.random.default_rng(size)
    x, S, lr = rng.standard_normal((samples, size)), 32, 0.1 * (1 - momentum)
    labels = rng.standard_normal(samples)
    e = labels - x @ np.linalg.lstsq(x, labels)[0]
    A, residual = x.T @ x / samples, np.mean(e**2)
    exact = finite_data(x, e, lr, S, momentum, np.zeros((size, size)))
    found = overparametrised(A, residual, lr, S, momentum)
    basis = np.linalg.eigh(A)[1]
    ratios = np.diag(basis.T @ found.covariance @ basis) / np.diag(basis.T @ exact @ basis)
    assert found.kappa / S > 0.08  # the amplification is seen
    assert found.test_loss == pytest.approx(np.trace(A @ exact) / 2, rel=0.04)
    assert np.std(ratios) < 0.2
    # What the limit does not describe, see the docstring.
    assert np.linalg.norm(found.covariance - exact) > 0.3 * np.linalg.norm(exact)


def test_residual_variance_is_the_mean_over_sample_sets() -> None:
    rng = np.random.default_rng(0)
    labels, x = rng.standard_normal((400, 50)), rng.standard_normal((400, 50, 20))
    weights = np.stack([np.linalg.lstsq(*pair)[0] for pair in zip(x, labels)])
    found = np.square(labels - np.einsum("kni,ki->kn", x, weights)).mean(1)
    assert abs(found.mean() - residual_variance(1.0, 50 / 20)) < 4 * found.std() / 20


def test_interpolation_ends_the_fluctuations() -> None:
    x = np.random.default_rng(0).standard_normal((20, 40))
    A = x.T @ x / 20
    found = overparametrised(A, residual_variance(1.0, 20 / 40), 0.2, 16)
    assert not found.covariance.any() and not found.noise.any() and found.kappa > 0
    assert np.abs(finite_data(x, np.zeros(20), 0.2, 16, 0.0, A)).max() < 1e-12 * np.abs(A).max()


def test_overparametrised_noise_solves_theorem_1_of_any_rank() -> None:
    root = np.random.default_rng(4).standard_normal((4, 2))
    A, lr = root @ root.T / 4, 0.2 * definite(4, 5)
    found = overparametrised(A, 0.8, lr, 3, 0.5)
    tau = np.trace(A @ found.covariance) + 0.8
    np.testing.assert_allclose(found.noise, (tau * A - A @ found.covariance @ A) / 3, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.covariance, iterated(A, found.noise, lr, 0.5), rtol=1e-9, atol=1e-12)


def iterated(H: np.ndarray, C: np.ndarray, lr: np.ndarray, mu: float) -> np.ndarray:
    """Covariance of w after 2000 steps from rest, where the Lyapunov equation is singular."""
    one = np.eye(len(H))
    F, P = np.block([[one - lr @ H, -mu * lr], [H, mu * one]]), np.vstack([-lr, one])
    moments, source = np.zeros((2 * len(H), 2 * len(H))), P @ C @ P.T
    for _ in range(2000):
        moments = F @ moments @ F.T + source
    return moments[: len(H), : len(H)]


@MOMENTA
@pytest.mark.parametrize("rank", [2, 4])
def test_corollary_3_is_the_fixed_point_of_its_noise(momentum: float, rank: int) -> None:
    root = np.random.default_rng(6).standard_normal((4, rank))
    H, lr = root @ root.T / 4, 0.2 * definite(4, 7)
    C = 2 * 0.3 / 8 * H
    exact = iterated(H, C, lr, momentum) if rank < 4 else lyapunov(H, C, lr, momentum)
    np.testing.assert_allclose(near_minimum(H, 0.3, lr, 8, momentum), exact, rtol=1e-9, atol=1e-12)


def test_corollary_3_leaves_out_what_grows_with_the_fluctuations() -> None:
    A, sizes = definite(3, 8), np.array([64, 128, 256])
    rest = [
        np.linalg.norm(near_minimum(A, 0.5, 0.2, int(S)) - Recursion(A, 0.2, int(S), 1.0).fixed_point()[1])
        for S in sizes
    ]
    assert slope(sizes, rest) == pytest.approx(-2, abs=0.15)


def test_theorem_5_is_exact_for_equal_residuals_and_the_gauss_newton_matrix() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    outputs = net(torch.randn(12, 2, dtype=torch.float64)).squeeze(-1)
    weights = list(net.parameters())
    rows = [torch.autograd.grad(output, weights, retain_graph=True) for output in outputs]
    J = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).numpy()

    def error(residuals: np.ndarray) -> float:
        gradients, S = J * residuals[:, None], 4
        mean = gradients.mean(0)
        exact = (gradients.T @ gradients / 12 - np.outer(mean, mean)) / S
        found = noise_near_minimum(J.T @ J / 12, np.mean(residuals**2) / 2, S, -mean)
        return np.linalg.norm(found - exact) / np.linalg.norm(exact)

    signs = np.where(np.arange(12) % 3 == 0, -0.1, 0.1)
    assert error(signs) < 1e-14
    assert error(signs * np.linspace(0.2, 1.8, 12)) > 0.05


@pytest.mark.parametrize(
    ("S", "momentum", "variance", "settles"),
    [(2, 0.0, 0.0, True), (4, 0.0, 0.0, False), (4, 0.5, 0.0, True), (4, 0.0, 0.5, True), (4, 0.5, 0.5, True)],
)
def test_natural_gradient_settles_for_batches_up_to_the_dimension(
    S: int, momentum: float, variance: float, settles: bool
) -> None:
    # Covariance and preconditioner together: Fisher information of the present second moments at every step.
    A, one, moments = definite(2, 9), np.eye(2), np.zeros((4, 4))
    moments[:2, :2] = np.diag([3.0, 0.1])
    spread = Recursion(A, 1.0, 1).spread()
    for _ in range(3000):
        fisher = (spread @ moments[:2, :2].ravel()).reshape(A.shape) + variance * A
        lr = 0.6 * np.linalg.inv(fisher)
        F, P = np.block([[one - lr @ A, -momentum * lr], [A, momentum * one]]), np.vstack([-lr, one])
        moments = F @ moments @ F.T + P @ fisher @ P.T / S
    found = natural_gradient(A, 0.6, S, variance, momentum).covariance
    assert np.allclose(moments[:2, :2], found, rtol=1e-9) == settles


EYE = np.eye(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.stationary([1.0], 0.1, 4, 1.0), r"A must be a square matrix \[D, D\], got shape \(1,\)"),
        (lambda r: r.stationary([[1.0, 1.0], [0.0, 1.0]], 0.1, 4, 1.0), "A must be finite and symmetric"),
        (lambda r: r.stationary(EYE * np.nan, 0.1, 4, 1.0), "A must be finite and symmetric"),
        (lambda r: r.stationary(np.diag([1.0, 0.0]), 0.1, 4, 1.0), "A must be positive definite, got smallest"),
        (lambda r: r.stationary(EYE, -0.1, 4, 1.0), "stationary: lr must be a finite number > 0, got -0.1"),
        (lambda r: r.stationary(EYE, np.eye(3), 4, 1.0), r"lr must be a square matrix \[2, 2\], got shape \(3, 3\)"),
        (lambda r: r.stationary(EYE, 0.1, 2.5, 1.0), "batch_size must be an integer >= 1, got 2.5"),
        (lambda r: r.stationary(EYE, 0.1, True, 1.0), "batch_size must be an integer >= 1, got True"),
        (lambda r: r.stationary(EYE, 0.1, 4, -1.0), "noise_variance must be a finite number >= 0, got -1.0"),
        (lambda r: r.stationary(EYE, 0.1, 4, 1.0, 1.0), r"stationary: momentum must be in \[0, 1\), got 1.0"),
        (lambda r: r.maximal_lr(EYE, 0), "maximal_lr: batch_size must be an integer >= 1, got 0"),
        (lambda r: r.stationary_covariance(EYE, EYE, 2.0), r"lr must keep lr \* hessian below 2 \(1 \+ momentum\) = 2"),
        (lambda r: r.minibatch_noise(EYE, -EYE, 4, 1.0), "covariance must be positive semidefinite, got smallest"),
        (lambda r: r.with_input_noise(EYE, EYE, [1.0], 0.1, 4), r"u must be finite numbers of shape \[2\]"),
        (lambda r: r.with_weight_decay(EYE, -2.0, [1.0, 1.0], 0.1, 4), r"A \+ decay must be positive definite"),
        (lambda r: r.with_weight_decay(EYE, [0.1, 0.1], [1.0, 1.0], 0.1, 4), r"a number or of shape \[2, 2\]"),
        (lambda r: r.decay_window(1.0, 1.0, 2), r"decay_window: lr must be below sqrt\(S/2\)/a = 1, got 1"),
        (lambda r: r.overparametrised(EYE, 1.0, 9.0, 4), "lr must be below the largest stable one, got"),
        (lambda r: r.residual_variance(1.0, 0), "residual_variance: alpha must be a finite number > 0, got 0"),
        (lambda r: r.near_minimum(EYE, 1.0, 3.0, 4), "near_minimum: lr must keep"),
        (lambda r: r.near_minimum(0 * EYE, 1.0, 0.1, 4), "the curvature must have an eigenvalue above 0"),
        (lambda r: r.noise_near_minimum(EYE, -1.0, 4), "loss must be a finite number >= 0, got -1.0"),
        (lambda r: r.damped_newton(EYE, "fast", 4, 1.0), "damped_newton: lr must be a finite number > 0, got 'fast'"),
        (lambda r: r.natural_gradient(EYE, 0, 4), "natural_gradient: lr must be a finite number > 0, got 0"),
    ],
)
def test_what_cannot_be_served_is_refused(call: Callable, message: str) -> None:
    with pytest.raises(FastregError, match=message):
        call(regression)
