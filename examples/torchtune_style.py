"""The gradient-norm penalty in a loop as torchtune's recipes have it: gradients of sums, divided once by tokens.

    python examples/torchtune_style.py               (a small GPT on this project's own pages; no torchtune is needed)

Batch j of an update has n_j labels that count, mean loss C_j over them, and the penalty R_j of its own micro-batches;
N is the sum of n_j. The update descends ``sum_j n_j (C_j + weight R_j) / N``. ``loss_step`` alone knows of fastreg.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastreg
from fastreg.models import GPT, GPTConfig

IGNORED = -100
DOCS = Path(__file__).resolve().parents[1] / "docs"
Batch = dict[str, Tensor]


def paragraphs(size: int, context: int, seed: int) -> Iterator[Batch]:
    """Batches of this documentation's paragraphs as bytes, padded: their numbers of labels differ."""
    draw = torch.Generator().manual_seed(seed)
    texts = [text for page in sorted(DOCS.glob("*.md")) for text in page.read_bytes().split(b"\n\n") if len(text) > 1]
    while True:
        chosen = [texts[i][: context + 1] for i in torch.randint(len(texts), (size,), generator=draw).tolist()]
        rows = torch.tensor([[*text, *[IGNORED] * (context + 1 - len(text))] for text in chosen])
        yield {"tokens": rows[:, :-1].clamp(min=0), "labels": rows[:, 1:]}


class Recipe:
    """A recipe: model, optimizer, and an update over several batches."""

    def __init__(self, model: nn.Module, weight: float, micro_batch_size: int) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        self.reg = fastreg.Regularizer(model, fastreg.GradNorm(weight), micro_batch_size=micro_batch_size)

    def loss_step(self, batch: Batch) -> Tensor:
        """The mean loss over the labels that count, with the penalty's gradient."""
        labels = batch["labels"]
        logits = self.model(batch["tokens"])
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return self.reg(loss, logits, counts=labels.ne(IGNORED).sum(1))

    def accumulate(self, batches: list[Batch]) -> Tensor:
        """Leave the gradient of an update in ``.grad``; its mean loss."""
        total, num_tokens = 0.0, 0
        for batch in batches:
            current = batch["labels"].ne(IGNORED).sum()
            # After reg, what multiplies the loss multiplies the penalty too: no scale to be told.
            loss = self.loss_step(batch) * current
            loss.backward()
            total, num_tokens = total + loss.detach(), num_tokens + current
        for parameter in self.model.parameters():
            parameter.grad /= num_tokens
        return total / num_tokens

    def update(self, batches: list[Batch]) -> Tensor:
        """One step of the optimizer."""
        loss = self.accumulate(batches)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def main(steps: int = 40, accumulated: int = 2, weight: float = 0.01) -> list[float]:
    """Mean losses of the updates."""
    torch.manual_seed(0)
    recipe = Recipe(GPT(GPTConfig(vocab=256, context=64, width=64, layers=2, heads=4)), weight, micro_batch_size=2)
    data, losses = paragraphs(8, 64, seed=0), []
    for step in range(steps):
        losses.append(recipe.update([next(data) for _ in range(accumulated)]).item())
        if step % 10 == 0:
            print(f"step {step:3d}  loss {losses[-1]:.3f}  R {recipe.reg.metrics['fastreg/grad_norm'].item():.3f}")
    return losses


if __name__ == "__main__":
    main()
