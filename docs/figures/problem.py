"""A small classifier on noisy clusters: what the pictures of the penalties are computed from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastreg

CLASSES, FEATURES = 3, 16


def model() -> nn.Module:
    """A perceptron of one hidden layer, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, CLASSES))


def batch(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs ``[samples, 16]`` and labels; the clusters are the same for every seed."""
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(1))
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=random)
    return centres[labels] + 2 * torch.randn(samples, FEATURES, generator=random), labels


def value(penalty: fastreg.Penalty, net: nn.Module, data: tuple[Tensor, Tensor], size: int) -> float:
    """R of the penalty on a batch in micro-batches of ``size``."""
    reg = fastreg.Regularizer(net, penalty, micro_batch_size=size, check=False)
    outputs = net(data[0])
    reg(F.cross_entropy(outputs, data[1]), outputs)
    reg.remove()
    return float(reg.metrics[f"fastreg/{penalty.name}"])


def train(net: nn.Module, penalty: fastreg.Penalty, steps: int = 120) -> tuple[list[float], list[float]]:
    """Losses and R by the step; batches of 128 in micro-batches of 16, learning rate 0.1."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reg = fastreg.Regularizer(net, penalty, micro_batch_size=16)
    losses, values = [], []
    for step in range(steps):
        inputs, labels = batch(128, seed=step)
        outputs = net(inputs)
        loss = reg(F.cross_entropy(outputs, labels), outputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        values.append(float(reg.metrics[f"fastreg/{penalty.name}"]))
    reg.remove()
    return losses, values
