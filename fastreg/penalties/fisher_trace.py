"""The Fisher-trace penalty."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.cross_entropy import drawn_cross_entropy
from fastreg.errors import FastregError
from fastreg.loss import Reduction
from fastreg.penalties.base import Penalty, Step


@dataclass(eq=False)
class FisherTrace(Penalty):
    """The squared norm of micro-batch gradients for labels drawn from the model itself.

        R = (1/m) sum_k ||gh_k||^2,   gh_k = grad (1/b) sum_{i in k} -log p(yh_i | x_i),   yh_i ~ softmax(outputs_i)

    One label is drawn per prediction and held fixed under differentiation, as in Novack et al. 2022
    (arXiv:2211.15853, section 3 and its code). Over the draw, ``E R = tr F / b``: the labels are independent given
    the outputs, so cross terms vanish; ``b`` is the micro-batch size. For outputs ``[B, T, C]`` there are ``T``
    predictions per sample and the mean runs over all of them.

    Args:
        weight: the coefficient of R.
        seed: seed of the label draw; None takes it from ``torch.initial_seed()`` at the first draw. Labels are a
            function of the logits, the seed and the number of draws so far: they repeat on any device, and torch's
            global generator is not advanced. Data-parallel ranks of one seed draw with the same random numbers, which
            leaves the mean over ranks unbiased; give each rank a seed of its own to make them independent.
        class_dim: the dimension of ``outputs`` that holds the classes.

    Attributes:
        last_labels: the labels of the last call, shaped as ``outputs`` without the class dimension.

    Raises:
        FastregError: at the call, if ``outputs`` were not passed or are not floating point logits.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Linear(3, 4)
        >>> reg = fastreg.Regularizer(model, fastreg.FisherTrace(weight=0.01, seed=0), micro_batch_size=2)
        >>> out = model(torch.randn(8, 3))
        >>> loss = reg(torch.nn.functional.cross_entropy(out, torch.randint(4, (8,))), out)
        >>> loss.backward()
    """

    weight: float
    seed: int | None = None
    class_dim: int = -1
    last_labels: Tensor | None = field(default=None, init=False, repr=False)
    _stream: int | None = field(default=None, init=False, repr=False)
    _draws: int = field(default=0, init=False, repr=False)
    name: ClassVar[str] = "fisher_trace"

    def surrogate(
        self, loss: Tensor, outputs: Tensor | None, reduction: Reduction, *, again: bool
    ) -> tuple[Tensor, Reduction]:
        logits = _logits(outputs, self.class_dim)
        if again:
            total = F.cross_entropy(logits.flatten(0, -2), self.last_labels.flatten(), reduction="sum")
        else:
            losses, labels = drawn_cross_entropy(logits.flatten(0, -2), self._seed(), self._draws)
            self._draws += 1
            self.last_labels, total = labels.view(logits.shape[:-1]), losses.sum()
        return total, Reduction("sum", scale=self.last_labels.numel() // logits.shape[0])

    def value(self, step: Step) -> Tensor:
        logits = _logits(step.outputs, self.class_dim)
        losses, labels = drawn_cross_entropy(logits.flatten(0, -2), self._seed(), self._draws)
        self._draws += 1
        self.last_labels = labels.view(logits.shape[:-1])
        return step.mean(step.sq_norms_of(losses.sum(), labels.numel() // step.session.micro_batches.samples))

    def _seed(self) -> int:
        """The seed in use, fixed from the first time it is asked for."""
        if self._stream is None:
            # Torch's seeds have 64 bits, an operator's integers 63 and a sign.
            self._stream = (torch.initial_seed() if self.seed is None else self.seed) % 2**63
        return self._stream

    def state_dict(self) -> dict[str, object]:
        return {"seed": self._seed(), "draws": self._draws}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self._stream, self._draws = state["seed"], state["draws"]


def sample_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One draw from ``softmax(logits)`` along the last dimension: ``[..., C] -> [...]`` int64."""
    probabilities = logits.flatten(0, -2).softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return torch.multinomial(probabilities, 1, generator=generator).view(logits.shape[:-1])


def _logits(outputs: Tensor | None, class_dim: int) -> Tensor:
    """The outputs with classes last."""
    if outputs is None:
        raise FastregError(
            "FisherTrace: outputs must be the model's logits, got none (call reg(loss, outputs): labels are drawn "
            "from them)"
        )
    if not outputs.is_floating_point() or outputs.dim() < 2:
        raise FastregError(
            f"FisherTrace: outputs must be floating point logits [B, ..., C], got {outputs.dtype} "
            f"{tuple(outputs.shape)}"
        )
    return outputs.movedim(class_dim, -1)
