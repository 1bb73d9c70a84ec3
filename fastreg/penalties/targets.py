"""Penalties that square micro-batch gradients of something made from the outputs, in the place of the loss."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.loss import Reduction
from fastreg.micro_batches import MicroBatches
from fastreg.penalties.base import Penalty, Step


class TargetPenalty(Penalty):
    """R = (1/m) sum_k || grad (1/n_k) sum of micro-batch k's ``n_k`` targets ||^2, one target per prediction.

    Outputs ``[B, ..., C]`` hold several predictions per sample (tokens), which count alike.

    Attributes:
        class_dim: the dimension of ``outputs`` that holds the classes.
    """

    class_dim: int

    @abstractmethod
    def target(self, logits: Tensor, cut: MicroBatches, *, again: bool) -> Tensor:
        """The sum over all predictions, a scalar.

        Args:
            logits: ``[B, ..., C]``, of this pass.
            cut: of the batch into micro-batches.
            again: whether to keep what was drawn in the pass before.
        """

    def value(self, step: Step) -> Tensor:
        cut, logits = step.session.micro_batches, self.logits(step.outputs)
        total = self.target(logits, cut, again=False)
        return step.mean(step.sq_norms_of(total, predictions(logits, cut)))

    def surrogate(
        self, loss: Tensor, outputs: Tensor | None, reduction: Reduction, cut: MicroBatches, *, again: bool
    ) -> tuple[Tensor, Reduction]:
        logits = self.logits(outputs)
        total = self.target(logits, cut, again=again)
        return total, Reduction("sum", scale=predictions(logits, cut))

    def logits(self, outputs: Tensor | None) -> Tensor:
        """The outputs with classes last."""
        name = type(self).__name__
        if outputs is None:
            raise FastregError(
                f"{name}: outputs must be the model's logits, got none (call reg(loss, outputs): the penalty is made "
                "from them)"
            )
        if not outputs.is_floating_point() or outputs.dim() < 2:
            raise FastregError(
                f"{name}: outputs must be floating point logits [B, ..., C], got {outputs.dtype} {tuple(outputs.shape)}"
            )
        return outputs.movedim(self.class_dim, -1)


def predictions(logits: Tensor, cut: MicroBatches) -> int:
    """Predictions per sample."""
    return logits[..., 0].numel() // cut.samples


class Draws:
    """Random numbers that are a function of a seed and of how often they were drawn before, on any device.

    Attributes:
        seed: fixed from the first draw on: that given, or ``torch.initial_seed()``.
        count: draws so far.
    """

    def __init__(self, seed: int | None) -> None:
        self._seed, self.count = seed, 0

    @property
    def seed(self) -> int:
        """In use."""
        if self._seed is None:
            self._seed = torch.initial_seed()
        # Torch's seeds have 64 bits, an operator's integers 63 and a sign.
        return self._seed % 2**63

    def next(self) -> int:
        """The number of this draw."""
        self.count += 1
        return self.count - 1

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers in float64, on the CPU."""
        # Neighbouring numbers far apart: an odd multiplier, that of the golden ratio.
        generator = torch.Generator().manual_seed((self.seed + self.next() * 0x9E3779B97F4A7C15) % 2**63)
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Of a checkpoint."""
        return {"seed": self.seed, "draws": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._seed, self.count = state["seed"], state["draws"]
