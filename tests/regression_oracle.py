"""The exact recursion of the second moments of SGD on linear regression.

It knows only the algorithm and the fourth moments of a Gaussian (Isserlis). Its state is ``z = (w, m, 1)``:
``z' = (F + P X Q) z - P xi`` with X the mean of S outer products ``x x'`` and xi the mean of ``x e``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_discrete_lyapunov


def definite(size: int, seed: int, low: float = 0.3) -> np.ndarray:
    """A random positive definite matrix with eigenvalues of order one."""
    root = np.random.default_rng(seed).standard_normal((size, size))
    return low * np.eye(size) + root @ root.T / size


@dataclass
class Recursion:
    """The linear map of ``vec E z z'`` over one step; ``decay`` is the gradient's ``decay @ w``."""

    A: np.ndarray
    lr: np.ndarray
    S: int
    variance: float = 0.0
    mu: float = 0.0
    u: np.ndarray | float = 0.0
    decay: np.ndarray | float = 0.0

    def __post_init__(self) -> None:
        size = len(self.A)
        one, none = np.eye(size), np.zeros((size, size))
        self.lr = self.lr * one if np.ndim(self.lr) == 0 else self.lr
        u, decay = np.zeros(size) + self.u, self.decay * one if np.ndim(self.decay) == 0 else self.decay
        column, corner = np.zeros((size, 1)), np.array([[1.0]])
        F = np.block([
            [one - self.lr @ decay, -self.mu * self.lr, column],
            [decay, self.mu * one, column],
            [column.T, column.T, corner],
        ])  # fmt: skip
        P, Q = np.vstack([-self.lr, one, column.T]), np.hstack([one, none, -u[:, None]])
        mean = F + P @ self.A @ Q
        self.map = np.kron(mean, mean) + np.kron(P, P) @ self.spread() @ np.kron(Q, Q)
        self.map[:, -1] += (P @ (self.variance / self.S * self.A) @ P.T).ravel()

    def spread(self) -> np.ndarray:
        """Covariance of ``vec X``, from ``E x_i x_j x_k x_l``, arranged to multiply ``vec`` of a matrix."""
        A, pairs = self.A, len(self.A) ** 2
        fourth = sum(np.einsum(f"{p},{q}->ijkl", A, A) for p, q in [("ij", "kl"), ("ik", "jl"), ("il", "jk")])
        return (fourth - np.einsum("ij,kl->ijkl", A, A)).transpose(0, 2, 1, 3).reshape(pairs, pairs) / self.S

    @property
    def radius(self) -> float:
        """Growth of second moments without sources: that of the block of (w, m)."""
        total = 2 * len(self.A) + 1
        kept = np.arange(total**2).reshape(total, total)[:-1, :-1].ravel()
        return np.abs(np.linalg.eigvals(self.map[np.ix_(kept, kept)])).max()

    def fixed_point(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of w."""
        equation, right = np.eye(len(self.map)) - self.map, np.zeros(len(self.map))
        equation[-1, -1] = right[-1] = 1.0  # the state's constant is one
        total, size = 2 * len(self.A) + 1, len(self.A)
        moments = np.linalg.solve(equation, right).reshape(total, total)
        mean = moments[:size, -1]
        return mean, moments[:size, :size] - np.outer(mean, mean)

    def noise(self) -> np.ndarray:
        """C of the minibatch gradient at the fixed point."""
        mean, covariance = self.fixed_point()
        moment = covariance + np.outer(mean - self.u, mean - self.u)
        return (self.spread() @ moment.ravel()).reshape(self.A.shape) + self.variance / self.S * self.A


def lyapunov(H: np.ndarray, C: np.ndarray, lr: np.ndarray, mu: float) -> np.ndarray:
    """Stationary covariance of w from that of (w, m) with gradient noise C."""
    one = np.eye(len(H))
    F, P = np.block([[one - lr @ H, -mu * lr], [H, mu * one]]), np.vstack([-lr, one])
    return solve_discrete_lyapunov(F, P @ C @ P.T)[: len(H), : len(H)]
