"""The gradient-norm penalty in a loop of Accelerate, with accumulation: one line differs from a loop without it.

    accelerate launch --cpu examples/accelerate_loop.py          (or python examples/accelerate_loop.py)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastreg


def main(epochs: int = 5, accumulated: int = 2, mixed_precision: str = "no") -> list[float]:
    """Fit a small classifier to three noisy clusters; return the penalties R of the last batches of epochs."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulated, mixed_precision=mixed_precision)
    torch.manual_seed(0)
    y = torch.randint(3, (1024,))
    x = torch.randn(3, 16)[y] + 2 * torch.randn(1024, 16)
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # The prepared model: under several processes it is another.
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=0.025), micro_batch_size=16)
    penalties = []
    for epoch in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                out = model(x)
                loss = reg(F.cross_entropy(out, y), out)
                accelerator.backward(loss)  # Divides by the number of accumulated batches: no scale for reg.
                optimizer.step()
                optimizer.zero_grad()
        penalties.append(reg.metrics["fastreg/grad_norm"].item())
        accelerator.print(f"epoch {epoch}  loss {loss.item():.3f}  mean ||g_k||^2 {penalties[-1]:.3f}")
    return penalties


if __name__ == "__main__":
    main()
