"""Steps of a monitored model, and what they are compared by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cases import Case
from fastreg import Monitor

SAMPLES, EXACT = 6, 1e-12
NOISE = ("grad_noise_scale", "noise_trace", "grad_norm", "micro_batch_grad_norm", "micro_batch_norms")


def train(model: nn.Module, case: Case, samples: int = SAMPLES, dtype: torch.dtype = torch.float64) -> Tensor:
    """Forward and backward; the loss."""
    inputs, targets = case.batch(samples, dtype)
    loss = case.loss_fn(model(inputs), targets)
    loss.backward()
    return loss.detach()


def assert_equal(got: nn.Module, want: nn.Module, tolerance: float = 0.0) -> None:
    """Gradients of two copies of a model."""
    for p, q in zip(got.parameters(), want.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance)


def assert_same_metrics(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = EXACT) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


def two_batches(model: nn.Module, case: Case, monitor: Monitor) -> dict[str, Tensor]:
    """An accumulated step of 4 and 3 samples."""
    train(model, case, 4)
    train(model, case, 3)
    return monitor.step(scale=1.0)


def run(monitor: Monitor, model: nn.Module, case: Case, steps: range) -> list[dict[str, Tensor]]:
    found = []
    for step in steps:
        model.zero_grad()
        train(model, case, 4 + step % 3)
        found.append(monitor.step())
    return found
