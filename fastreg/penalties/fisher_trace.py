"""The Fisher-trace penalty."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastreg.cross_entropy import cross_entropy, drawn_cross_entropy
from fastreg.errors import FastregError
from fastreg.hosted import hosted
from fastreg.micro_batches import MicroBatches
from fastreg.penalties.base import Step
from fastreg.penalties.targets import Draws, TargetPenalty, predictions
from fastreg.weights import Weight

GRADIENTS = ("fixed-label", "frozen", "true")
LABELS = ("sampled", "exact")


@dataclass(eq=False)
class FisherTrace(TargetPenalty):
    """The squared norm of micro-batch gradients for labels drawn from the model itself.

        R = (1/m) sum_k ||gh_k||^2,   gh_k = grad (1/b) sum_{i in k} -log p(yh_i | x_i),   yh_i ~ softmax(outputs_i)

    One label is drawn per prediction, as in Novack et al. 2022 (arXiv:2211.15853, section 3 and its code). Over the
    draw ``E R = tr F / b``: the labels are independent given the outputs, so cross terms vanish; ``b`` is the
    micro-batch size, and ``micro_batch_size=1`` gives the trace itself, with less variance. For outputs
    ``[B, T, C]`` there are ``T`` predictions per sample and the mean runs over all of them.

    ``labels="exact"`` sums over all C classes instead, ``R = tr F = (1/B) sum_i sum_y p_iy ||grad -log p_iy||^2``: no
    draw, C first passes and their memory, and per-sample norms only.

    R has three gradients (the difference is derived here):

        "fixed-label"   labels are constants, as in the paper's code. Its expectation is that of "frozen"
        "frozen"        the whole covariance of the softmax is: grad of ||J^T (p - onehot(yh))||^2 with p constant. Less
                        variance, and exactly 0 in models linear in their parameters
        "true"          of tr F / b, without bias: "fixed-label" plus ||gh_k||^2 grad log p(yh_k) (less the mean of the
                        other micro-batches' squared norms, which takes variance and adds no bias); with exact labels
                        p_iy is differentiated

    Args:
        weight: the coefficient of R, a number or a policy of :mod:`fastreg.weights`.
        seed: seed of the label draw; None takes it from ``torch.initial_seed()`` at the first draw. Labels are a
            function of the logits, the seed and the number of draws so far: they repeat on any device, and torch's
            global generator is not advanced. Data-parallel ranks of one seed draw with the same random numbers, which
            leaves the mean over ranks unbiased; give each rank a seed of its own to make them independent.
        class_dim: the dimension of ``outputs`` that holds the classes.
        gradient: one of the three; "fixed-label" goes with sampled labels alone.
        labels: ``"sampled"`` or ``"exact"``.

    Attributes:
        last_labels: the labels of the last call, shaped as ``outputs`` without the class dimension.

    Raises:
        FastregError: another value of an option; at the call, if ``outputs`` were not passed or are not floating point
            logits, or for exact labels with larger micro-batches or several predictions per sample.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Linear(3, 4)
        >>> reg = fastreg.Regularizer(model, fastreg.FisherTrace(weight=0.01, seed=0), micro_batch_size=2)
        >>> out = model(torch.randn(8, 3))
        >>> loss = reg(torch.nn.functional.cross_entropy(out, torch.randint(4, (8,))), out)
        >>> loss.backward()
    """

    weight: float | Weight
    seed: int | None = None
    class_dim: int = -1
    gradient: str = "fixed-label"
    labels: str = "sampled"
    last_labels: Tensor | None = field(default=None, init=False, repr=False)
    name: ClassVar[str] = "fisher_trace"
    kept: ClassVar[tuple[str, ...]] = ("last_labels",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, known in (("gradient", GRADIENTS), ("labels", LABELS)):
            if getattr(self, option) not in known:
                raise FastregError(f"FisherTrace: {option} must be one of {known}, got {getattr(self, option)!r}")
        if self.labels == "exact" and self.gradient == "fixed-label":
            raise FastregError(
                "FisherTrace: gradient must be 'frozen' or 'true' with labels='exact', got 'fixed-label' (its mean "
                "over labels is the gradient of 'frozen')"
            )
        self._draws = Draws(self.seed)
        self._residual: Tensor | None = None

    @property
    def constants(self) -> int:
        return self._draws.seed

    def target(self, logits: Tensor, cut: MicroBatches, *, again: bool) -> Tensor:
        if self.gradient == "frozen":
            if not again:
                self._drawn(logits)
                self._residual = _residual(logits, self._known)
            assert self._residual is not None
            return (self._residual * logits).sum()
        return (_losses(logits, self._known) if again else self._drawn(logits)).sum()

    def value(self, step: Step) -> Tensor:
        if self.labels == "exact":
            return self._exact(step)
        if self.gradient == "true":
            return self._with_score(step)
        return super().value(step)

    @property
    def _known(self) -> Tensor:
        """The labels drawn last."""
        assert self.last_labels is not None
        return self.last_labels

    def _drawn(self, logits: Tensor) -> Tensor:
        """Draw labels; their losses ``[n]``, one per prediction."""
        losses, labels = drawn_cross_entropy(logits.flatten(0, -2), self._draws.seed, hosted(self._draws.next))
        self.last_labels = labels.view(logits.shape[:-1])
        return losses

    def _with_score(self, step: Step) -> Tensor:
        """As :meth:`value`, whose gradient knows that the labels' probabilities change."""
        cut, logits = step.session.micro_batches, self.logits(step.outputs)
        losses = self._drawn(logits)
        squared = step.sq_norms_of(losses.sum(), predictions(logits, cut))
        known, count = squared.detach(), step.selected_count
        others = (known.sum() - known) / (count - 1) if count > 1 else torch.zeros_like(known)
        advantage = step.session.masked(known - others)
        log_p = -cut.reduce(losses, ())
        return step.mean(squared + advantage * (log_p - log_p.detach()))

    def _exact(self, step: Step) -> Tensor:
        """Sum over classes, a first pass each."""
        cut, logits = step.session.micro_batches, self.logits(step.outputs)
        if cut.size != 1 or logits.dim() != 2:
            raise FastregError(
                f"FisherTrace: labels='exact' must have micro_batch_size=1 and outputs [B, C], got {cut.size} and "
                f"{tuple(logits.shape)} (the sum over labels is one of per-sample norms)"
            )
        p = logits.softmax(-1)
        weights = p if self.gradient == "true" else p.detach()
        squared = [step.sq_norms_of(self._loss_of(logits, y), 1) for y in range(logits.shape[1])]
        return step.mean((weights * torch.stack(squared, 1)).sum(1))

    def _loss_of(self, logits: Tensor, y: int) -> Tensor:
        labels = torch.full((len(logits),), y, device=logits.device)
        return (_residual(logits, labels) * logits if self.gradient == "frozen" else _losses(logits, labels)).sum()

    def state_dict(self) -> dict[str, Any]:
        return self._draws.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws.load_state_dict(state)


def sample_labels(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One draw from ``softmax(logits)`` along the last dimension: ``[..., C] -> [...]`` int64."""
    probabilities = logits.flatten(0, -2).softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return torch.multinomial(probabilities, 1, generator=generator).view(logits.shape[:-1])


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, -2), labels.flatten())


def _residual(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy's gradient by the logits, as a constant."""
    p = logits.detach().softmax(-1)
    return p.scatter_add(-1, labels.unsqueeze(-1), p.new_full((*labels.shape, 1), -1))
