"""The gradient-norm penalty in a loop as torchtitan has it: a model is built, made parallel, and knows no loss.

    python examples/torchtitan_style.py                         (a small GPT on this project's own pages)
    python examples/torchtitan_style.py --compile               (forward, penalty, backward: one graph; a minute more)
    torchrun --nproc-per-node 2 examples/torchtitan_style.py    (FSDP2; no torchtitan is needed)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fastreg
from examples import _text
from fastreg.models import GPT, GPTConfig


def loss_fn(pred: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over tokens: a function of its own, as the model knows no loss."""
    return F.cross_entropy(pred.flatten(0, 1), labels.flatten())


def parallelize(model: nn.Module) -> nn.Module:
    """Activation checkpointing, then FSDP2 among the processes of torchrun."""
    fastreg.checkpoint_blocks(model.blocks)
    if dist.is_initialized():
        for module in (*model.blocks, model):
            # A double backward needs whole parameters between its two passes.
            fully_shard(module, reshard_after_forward=False)
    return model


class Trainer:
    """An update over ``accumulated`` batches: the gradient of the mean of their losses and penalties."""

    def __init__(self, model: nn.Module, weight: float, accumulated: int, compiled: bool = False) -> None:
        self.model, self.share = model, 1 / accumulated
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        self.reg = fastreg.Regularizer(model, fastreg.GradNorm(weight), micro_batch_size=2)
        self.step = fastreg.compile(self.forward_backward, model) if compiled else self.forward_backward

    def forward_backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """One batch."""
        if sharded := isinstance(self.model, FSDPModule):
            self.model.set_reshard_after_backward(False)
        pred = self.model(inputs)
        # The loss was multiplied by the share of its batch, and R is not linear in it.
        loss = self.reg(loss_fn(pred, labels) * self.share, pred, scale=self.share)
        if sharded:
            self.model.set_reshard_after_backward(True)
        loss.backward()
        return loss.detach()

    def update(self, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One step of the optimizer; the mean loss of this process."""
        # Gradients that come and go would make a second graph of a compiled step.
        self.optimizer.zero_grad(set_to_none=False)
        loss = sum(self.step(*batch) for batch in batches)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss


def main(steps: int = 30, accumulated: int = 2, compiled: bool = False) -> list[float]:
    """Mean losses of the updates of this process."""
    torch.manual_seed(0)
    trainer = Trainer(parallelize(GPT(GPTConfig(256, 64, 64, layers=2, heads=4))), 0.01, accumulated, compiled)
    rank = dist.get_rank() if dist.is_initialized() else 0
    text, losses = _text.load(None, 256, 65), []
    for step in range(steps):
        batches = [_text.batch(text, 8, 64, 1000 * step + 10 * rank + part) for part in range(accumulated)]
        losses.append(trainer.update(batches).item())
        if step % 10 == 0 and not rank:
            print(f"step {step:3d}  loss {losses[-1]:.3f}  R {trainer.reg.metrics['fastreg/grad_norm'].item():.3f}")
    return losses


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    main(compiled="--compile" in sys.argv)
    if dist.is_initialized():
        dist.destroy_process_group()
