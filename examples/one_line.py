"""The gradient-norm penalty in a plain training loop: two lines differ from a loop without it.

    python examples/one_line.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import fastreg


def main(steps: int = 60) -> list[float]:
    """Fit a small classifier to three noisy clusters; return the mean squared micro-batch gradient norms."""
    torch.manual_seed(0)
    centres = torch.randn(3, 16)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=0.025), micro_batch_size=16)
    norms = []
    for step in range(steps):
        y = torch.randint(3, (128,))
        x = centres[y] + 2 * torch.randn(128, 16)
        out = model(x)
        loss = reg(F.cross_entropy(out, y), out)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(reg.metrics["fastreg/grad_norm"])
        if step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}  mean ||g_k||^2 {norms[-1].item():.3f}")
    return [norm.item() for norm in norms]


if __name__ == "__main__":
    main()
