"""Closed forms of SGD on linear regression against the exact recursion of its second moments, and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from fastreg.errors import FastregError
from fastreg.noise.regression import (
    damped_newton,
    decay_window,
    maximal_lr,
    minibatch_noise,
    natural_gradient,
    stationary,
    stationary_covariance,
    with_input_noise,
    with_weight_decay,
)
from regression_oracle import Recursion, definite, lyapunov

EXACT = {"rtol": 1e-10, "atol": 1e-13}
MOMENTA = pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])


@MOMENTA
@pytest.mark.parametrize("scalar", [True, False])
def test_theorem_1_is_the_lyapunov_fixed_point(momentum: float, scalar: bool) -> None:
    H, C, lr = definite(4, 0), definite(4, 1), 0.3 * np.eye(4) if scalar else 0.3 * definite(4, 2)
    assert scalar or np.abs(lr @ H - H @ lr).max() > 0.05
    found = stationary_covariance(H, C, 0.3 if scalar else lr, momentum)
    np.testing.assert_allclose(found, lyapunov(H, C, lr, momentum), rtol=1e-12, atol=1e-12)


@MOMENTA
@pytest.mark.parametrize("kind", ["scalar", "commuting", "matrix"])
def test_label_noise_is_the_fixed_point_of_the_moments(momentum: float, kind: str) -> None:
    A, S = definite(3, 3), 4
    one = np.eye(3)
    lr = 0.12 * (1 - momentum) * {"scalar": one, "commuting": np.linalg.inv(A + one), "matrix": definite(3, 4)}[kind]
    oracle = Recursion(A, lr, S, 1.7, momentum, u=np.array([1.0, -2.0, 0.5]))
    found = stationary(A, lr[0, 0] if kind == "scalar" else lr, S, 1.7, momentum)
    mean, covariance = oracle.fixed_point()
    np.testing.assert_allclose(mean, oracle.u, **EXACT)
    np.testing.assert_allclose(found.covariance, covariance, **EXACT)
    np.testing.assert_allclose(found.noise, oracle.noise(), **EXACT)
    np.testing.assert_allclose(found.test_loss, np.trace(A @ covariance) / 2, **EXACT)
    np.testing.assert_allclose(found.kappa, S * np.trace(A @ covariance) / 1.7, **EXACT)
    np.testing.assert_allclose(found.trace, found.kappa / (1 + found.kappa / S), **EXACT)


def test_lemma_1_at_given_weights() -> None:
    A, moment = definite(3, 5), definite(3, 6)
    rng = np.random.default_rng(0)
    x = rng.multivariate_normal(np.zeros(3), A, 100_000)
    v = rng.multivariate_normal(np.zeros(3), moment, 100_000)
    gradients = x * ((x * v).sum(1) - 0.5**0.5 * rng.standard_normal(len(x)))[:, None]
    products = gradients[:, :, None] * gradients[:, None, :] - np.einsum("ij,nj,nk,kl->nil", A, v, v, A)
    error = products.std(0) / len(x) ** 0.5
    assert (error < 0.03 * np.abs(products.mean(0)).max()).all()
    assert (np.abs(products.mean(0) / 8 - minibatch_noise(A, moment, 8, 0.5)) < 4 * error / 8).all()


def simulate(A: np.ndarray, noisy: np.ndarray, u: np.ndarray, lr: float, S: int, variance: float, mu: float,
             decay: float) -> np.ndarray:  # fmt: skip
    """Weights of 4000 chains after 130 steps, inputs ``x + n`` with n of covariance ``noisy``."""
    rng, chains, size = np.random.default_rng(1), 4000, len(u)
    clean, dirty = np.linalg.cholesky(A), np.linalg.cholesky(noisy + 1e-300 * np.eye(size))
    w, m = np.tile(u, (chains, 1)), np.zeros((chains, size))
    for _ in range(130):
        x = rng.standard_normal((chains, S, size)) @ clean.T
        y = x @ u + variance**0.5 * rng.standard_normal((chains, S))
        seen = x + rng.standard_normal((chains, S, size)) @ dirty.T
        residual = np.einsum("csd,cd->cs", seen, w) - y
        m = mu * m + np.einsum("csd,cs->cd", seen, residual) / S + decay * w
        w = w - lr * m
    return w


@pytest.mark.parametrize("case", ["labels", "inputs", "decay"])
def test_simulation_agrees_within_four_standard_errors(case: str) -> None:
    A, B, u = np.array([[1.0, 0.3], [0.3, 0.5]]), 0.4 * np.eye(2), np.array([2.0, -1.0])
    lr, S, mu, none = 0.12, 8, 0.5, np.zeros((2, 2))
    if case == "labels":
        chains, found, mean = simulate(A, none, u, lr, S, 1.0, mu, 0.0), stationary(A, lr, S, 1.0, mu), u
    elif case == "inputs":
        found = with_input_noise(A, B, u, lr, S, 0.5, mu)
        chains, mean = simulate(A, B, u, lr, S, 0.5, mu, 0.0), found.centre
    else:
        found = with_weight_decay(A, 0.4, u, lr, S, 0.5, mu)
        chains, mean = simulate(A, none, u, lr, S, 0.5, mu, 0.4), found.centre
    products = (chains - mean)[:, :, None] * (chains - mean)[:, None, :]
    error = products.std(0) / len(chains) ** 0.5
    assert (error < 0.03 * np.diag(found.covariance).max()).all()
    assert (np.abs(chains.mean(0) - mean) < 4 * chains.std(0) / len(chains) ** 0.5).all()
    assert (np.abs(products.mean(0) - found.covariance) < 4 * error).all()
    losses = np.einsum("ci,ij,cj->c", chains - u, A, chains - u) / 2
    assert abs(losses.mean() - found.test_loss) < 4 * losses.std() / len(chains) ** 0.5


@MOMENTA
@pytest.mark.parametrize("S", [1, 3, 64])
def test_second_moments_diverge_at_the_maximal_lr(momentum: float, S: int) -> None:
    A = definite(3, 7)
    lr = maximal_lr(A, S, momentum)
    np.testing.assert_allclose(Recursion(A, lr, S, mu=momentum).radius, 1.0, atol=1e-8)
    below, above = (Recursion(A, factor * lr, S, mu=momentum).radius for factor in (0.99, 1.01))
    assert below < 1 - 1e-4 < 1 + 1e-4 < above
    assert stationary(A, (1 - 1e-6) * lr, S, 1.0, momentum).trace == pytest.approx(S, rel=1e-4)
    with pytest.raises(FastregError, match=r"stationary: lr must be below the largest stable one, got 1\.0001"):
        stationary(A, (1 + 1e-4) * lr, S, 1.0, momentum)


@MOMENTA
@pytest.mark.parametrize(("size", "S"), [(1, 1), (1, 5), (6, 2), (20, 7)])
def test_maximal_lr_of_an_isotropic_spectrum(momentum: float, size: int, S: int) -> None:
    expected = 2 * (1 - momentum) * S / (0.7 * (size + 1 + S * (1 - momentum) / (1 + momentum)))
    np.testing.assert_allclose(maximal_lr(0.7 * np.eye(size), S, momentum), expected, rtol=1e-13)


def test_maximal_lr_tends_to_that_of_gradient_descent() -> None:
    assert maximal_lr(np.diag([0.5, 2.0]), 10**9, 0.6) == pytest.approx(2 * 1.6 / 2.0, rel=1e-7)


@MOMENTA
def test_input_noise_is_the_fixed_point_of_the_moments(momentum: float) -> None:
    A, B, u, S, lr = definite(3, 8), definite(3, 9), np.array([1.0, 2.0, -1.0]), 5, 0.1 * (1 - momentum)
    # Regression of a Gaussian label on the noisy input: coefficients and residual by the joint covariance.
    joint = np.block([[A + B, (A @ u)[:, None]], [(A @ u)[None, :], np.array([[u @ A @ u + 0.3]])]])
    precision = np.linalg.inv(joint)
    coefficients, residual = -precision[:3, 3] / precision[3, 3], 1 / precision[3, 3]
    found = with_input_noise(A, B, u, lr, S, 0.3, momentum)
    mean, covariance = Recursion(A + B, lr, S, residual, momentum, u=coefficients).fixed_point()
    np.testing.assert_allclose(found.centre, mean, **EXACT)
    np.testing.assert_allclose(found.covariance, covariance, **EXACT)
    loss = (np.trace(A @ covariance) + (mean - u) @ A @ (mean - u)) / 2
    np.testing.assert_allclose(found.test_loss, loss, **EXACT)


@MOMENTA
@pytest.mark.parametrize("commuting", [True, False])
def test_weight_decay_is_the_fixed_point_of_the_moments(momentum: float, commuting: bool) -> None:
    A, u, S = definite(3, 10), np.array([1.0, -2.0, 0.5]), 5
    decay = 0.3 * np.eye(3) if commuting else 0.4 * definite(3, 11)
    lr = 0.2 * (1 - momentum) * (np.eye(3) if commuting else definite(3, 12))
    oracle = Recursion(A, lr, S, 0.3, momentum, u, decay)
    mean, covariance = oracle.fixed_point()
    found = with_weight_decay(A, 0.3 if commuting else decay, u, lr, S, 0.3, momentum)
    np.testing.assert_allclose(found.centre, mean, **EXACT)
    np.testing.assert_allclose(found.covariance, covariance, **EXACT)
    np.testing.assert_allclose(found.noise, oracle.noise(), **EXACT)
    loss = (np.trace(A @ covariance) + (mean - u) @ A @ (mean - u)) / 2
    np.testing.assert_allclose(found.test_loss, loss, **EXACT)


def theorem_4(A: np.ndarray, decay: np.ndarray, u: np.ndarray, lr: float, S: int) -> float:
    """The test loss in closed form, for ``[A, decay] = 0``."""
    K, U = A + decay, np.outer(u, u)
    inverse = np.linalg.inv(K)
    bare = inverse @ inverse @ decay @ decay
    G = np.linalg.inv(2 * np.eye(len(A)) - lr * (K + inverse @ A @ A / S))
    trace = np.trace(A @ A @ inverse @ G)
    r = np.trace(A @ A @ A @ inverse @ bare @ G @ U) / (1 - lr / S * trace)
    first = np.trace(A @ bare @ U) * trace / (1 - lr / S * trace)
    return lr / (2 * S) * (first + r) + np.trace(A @ bare @ U) / 2


def test_theorem_4_is_the_test_loss_where_decay_and_inputs_commute() -> None:
    A, u = definite(3, 10), np.array([1.0, -2.0, 0.5])
    decay = 0.2 * np.eye(3) + 0.1 * A @ A
    found = with_weight_decay(A, decay, u, 0.3, 4)
    np.testing.assert_allclose(found.test_loss, theorem_4(A, decay, u, 0.3, 4), **EXACT)
    decay = np.diag([0.1, 1.0, 0.4])
    exact = with_weight_decay(A, decay, u, 0.3, 4).test_loss
    assert abs(theorem_4(A, decay, u, 0.3, 4) / exact - 1) > 0.01


@pytest.mark.parametrize(("a", "lr", "S"), [(1.0, 0.4, 3), (1.0, 1.5, 8), (2.0, 0.3, 1)])
def test_decay_window_is_where_second_moments_are_finite(a: float, lr: float, S: int) -> None:
    A, (low, high) = np.array([[a]]), decay_window(a, lr, S)
    for end, inside in [(low, 1e-3), (high, -1e-3)]:
        assert Recursion(A, lr, S, decay=end).radius == pytest.approx(1.0, abs=1e-9)
        assert Recursion(A, lr, S, decay=end + inside).radius < 1 < Recursion(A, lr, S, decay=end - inside).radius
        with_weight_decay(A, end + inside, [1.0], lr, S)
        with pytest.raises(FastregError, match="with_weight_decay: lr must keep second moments finite"):
            with_weight_decay(A, end - inside, [1.0], lr, S)
    # Beyond the largest rate that is stable without decay, only negative decay is.
    assert (high < 0) == (lr * a > 2 * S / (S + 2))


@MOMENTA
def test_weight_decay_is_refused_exactly_beyond_the_spectral_radius(momentum: float) -> None:
    A, decay, S, u = definite(2, 13), np.diag([0.9, 0.1]), 2, [1.0, 1.0]
    lr = np.linspace(0.02, 2.0, 40)
    stable = [Recursion(A, rate, S, mu=momentum, decay=decay).radius < 1 for rate in lr]
    accepted = []
    for rate in lr:
        try:
            with_weight_decay(A, decay, u, rate, S, momentum=momentum)
            accepted.append(True)
        except FastregError:
            accepted.append(False)
    assert accepted == stable and 0 < sum(stable) < len(lr)


@MOMENTA
def test_damped_newton_has_its_closed_form(momentum: float) -> None:
    A, S, lr = definite(3, 14), 6, 0.4 * (1 - momentum)
    g = 2 * (1 - momentum) - ((1 - momentum) / (1 + momentum) + 1 / S) * lr
    found = damped_newton(A, lr, S, 0.8, momentum)
    np.testing.assert_allclose(found.covariance, lr * 0.8 / (g * S - lr * 3) * np.linalg.inv(A), **EXACT)
    edge = maximal_lr(np.eye(3), S, momentum)
    with pytest.raises(FastregError, match="lr must be below the largest stable one"):
        damped_newton(A, 1.001 * edge, S, 0.8, momentum)
    assert damped_newton(A, 0.999 * edge, S, 0.8, momentum).kappa > 100


@MOMENTA
@pytest.mark.parametrize("variance", [0.0, 0.5, 50.0])
def test_natural_gradient_reproduces_itself_under_the_moments(momentum: float, variance: float) -> None:
    A, S, lr = definite(3, 15), 4, 0.6
    found = natural_gradient(A, lr, S, variance, momentum)
    # The Fisher information of single samples at these weights, as the recursion knows it.
    spread = Recursion(A, 1.0, 1).spread()
    fisher = (spread @ found.covariance.ravel()).reshape(A.shape) + variance * A
    np.testing.assert_allclose(found.lr, lr * np.linalg.inv(fisher), **EXACT)
    np.testing.assert_allclose(found.noise, fisher / S, **EXACT)
    oracle = Recursion(A, found.lr, S, variance, momentum)
    if variance:
        np.testing.assert_allclose(oracle.fixed_point()[1], found.covariance, **EXACT)
        return
    spread_of_paper = lr / 2 * (1 / (4 * (1 + momentum)) + 1 / ((1 - momentum) * S))
    np.testing.assert_allclose(found.covariance, spread_of_paper * np.linalg.inv(A), **EXACT)
    # Without labels' noise every multiple is stationary at this preconditioner, which sits at the edge.
    assert oracle.radius == pytest.approx(1.0, abs=1e-8)
    np.testing.assert_allclose(lyapunov(A, found.noise, found.lr, momentum), found.covariance, rtol=1e-9)
