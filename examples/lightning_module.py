"""A module of Lightning with the gradient-norm penalty and without.

    python examples/lightning_module.py                                         (a small classifier, a few seconds)

For a module of your own: the Regularizer in ``__init__``, ``self.reg`` around the loss that ``training_step`` returns,
and ``configure_callbacks`` for logs and checkpoints.
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastreg
from fastreg.integrations.lightning import RegularizerCallback


class Classifier(lightning.LightningModule):
    """A small network on vectors of 16 numbers."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 3))
        self.reg = fastreg.Regularizer(self.net, fastreg.GradNorm(weight), micro_batch_size=16)

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        inputs, targets = batch
        return self.reg(F.cross_entropy(self.net(inputs), targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def configure_callbacks(self) -> list[lightning.Callback]:
        return [RegularizerCallback(self.reg)]


def clusters(samples: int = 4096) -> TensorDataset:
    """Three noisy clusters."""
    draw = torch.Generator().manual_seed(0)
    centres, y = torch.randn(3, 16, generator=draw), torch.randint(3, (samples,), generator=draw)
    return TensorDataset(centres[y] + 2 * torch.randn(samples, 16, generator=draw), y)


def main(epochs: int = 6, weights: tuple[float, ...] = (0.0, 1.0)) -> dict[float, dict[str, float]]:
    """The last log of each run, by weight of the penalty."""
    found = {}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for weight in weights:
        lightning.seed_everything(0, verbose=False)
        trainer = lightning.Trainer(
            accelerator="auto", max_epochs=epochs, accumulate_grad_batches=2, gradient_clip_val=1.0, **quiet
        )
        trainer.fit(Classifier(weight), DataLoader(clusters(), batch_size=128, shuffle=True))
        found[weight] = {name: value.item() for name, value in trainer.logged_metrics.items()}
        print(f"weight {weight}: mean ||g_k||^2 {found[weight]['fastreg/grad_norm']:.4f}")
    return found


if __name__ == "__main__":
    main()
