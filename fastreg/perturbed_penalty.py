r"""Penalties by gradients at perturbed weights: first-order passes alone.

The gradient of ``(1/m) sum_k ||g_k||^2`` is ``(2/m) sum_k H_k g_k``, and ``H_k g_k`` is how the gradient of
micro-batch k changes along ``g_k``. With steps ``e_k`` of one common length in units of ``g_k``, all micro-batches in
one batched pass:

    forward     H_k g_k ~ (g_k(w + e g_k) - g_k(w)) / e                 error O(e)
    central     H_k g_k ~ (g_k(w + e g_k) - g_k(w - e g_k)) / 2e        error O(e^2)
    lookahead   g_k(w) + 2 weight H_k g_k ~ g_k(w + 2 weight g_k)       error O(weight^2), nothing is subtracted

Counted in layer products (a plain step is 3): forward 6 plus segment terms, central 9, lookahead 5. Under
``fully_shard`` forward takes 7: ranks exchange gradients as they arrive, so a rank must know the number that it
multiplies them by before, and norms take a pass of their own to give it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fastreg.attach import buffers_kept
from fastreg.delivered import Delivered, Gradients, plus, times
from fastreg.errors import FastregError
from fastreg.graph_walk import kinks
from fastreg.loss import Reduction, check_loss, first_tensor
from fastreg.penalties.base import Penalty
from fastreg.perturbed_passes import PerturbedPasses
from fastreg.ranks import sq_norms
from fastreg.recording import Recorder
from fastreg.session import Phase, Session
from fastreg.sharding import own_parameters

DIFFERENCES = ("forward", "central", "lookahead")

# Measured: 3 in MLPs, 200 in a small GPT, whose gradients lie in few of its weights (bench/NOTES.md).
CURVATURE = 100


class PerturbedPenalty:
    """Gradient of ``loss + sum_p weight_p R_p`` by gradients at perturbed weights.

    Args:
        model, micro_batch_size, parameters: as for :class:`fastreg.Regularizer`.
        penalties: those with a surrogate (see :meth:`fastreg.Penalty.surrogate`).
        difference: one of ``DIFFERENCES``.
        radius: r, root mean square of the displacements in units of ``||w||``. None takes the r at which truncation is
            as large as rounding, ``eps / r``, if every derivative brings a factor of ``CURVATURE / ||w||``: ``CURVATURE
            r`` (central: its square). eps is that of the coarsest dtype in the forward.
    """

    def __init__(
        self,
        model: nn.Module,
        micro_batch_size: int,
        parameters: Sequence[nn.Parameter],
        penalties: Sequence[Penalty],
        difference: str,
        radius: float | None,
    ) -> None:
        _check_options(difference, radius, penalties)
        self.model, self.penalties, self.difference, self.radius = model, penalties, difference, radius
        self._passes = PerturbedPasses(model, micro_batch_size, parameters)
        self._passes.recorder.keeps_outputs = True
        self._warned = False
        self.values: list[Tensor] = []
        self.sq_norms: Tensor | None = None

    @property
    def recorder(self) -> Recorder:
        """What is attached to the model."""
        return self._passes.recorder

    def __call__(self, run: Callable[[], Tensor], reduction: Reduction, weights: Sequence[float]) -> Tensor:
        """The loss, whose backward hands out the gradients found here; weights are those of the penalties."""
        trainable = [p for p in own_parameters(self.model) if p.requires_grad]
        with torch.enable_grad(), self._passes.same_random_numbers() as rewind:
            gradients: Gradients = [None] * len(trainable)
            loss: Tensor | None = None
            self.values = []
            for number, (penalty, weight) in enumerate(zip(self.penalties, weights, strict=True)):
                term = _Term(self, penalty, reduction, trainable, weight * reduction.scale)
                if number:
                    rewind()
                with buffers_kept(self.model) if number else nullcontext():
                    loss, own = term.first(run, loss)
                gradients = plus(gradients, own)
                for sign in term.signs:
                    rewind()
                    gradients = plus(gradients, term.again(run, sign))
                self.values.append(term.value)
        # DistributedDataParallel has counted those without a gradient as done.
        reached = [number for number, g in enumerate(gradients) if g is not None]
        return Delivered.apply(loss, [gradients[i] for i in reached], *(trainable[i] for i in reached))

    def warn_of_kinks(self, loss: Tensor) -> None:
        """Once: on a piecewise linear network a finite difference sees the kinks between two points."""
        found = () if self._warned else kinks(loss)
        self._warned = True
        if found:
            warnings.warn(
                f"Regularizer: the network has kinks ({', '.join(found)}); a finite difference across them is not the "
                "Hessian that exists almost everywhere, to which method='exact' keeps",
                stacklevel=6,
            )


class _Term:
    """One penalty of one step."""

    def __init__(
        self,
        owner: PerturbedPenalty,
        penalty: Penalty,
        reduction: Reduction,
        trainable: list[nn.Parameter],
        weight: float,
    ) -> None:
        self.owner, self.penalty, self.reduction, self.trainable = owner, penalty, reduction, trainable
        self.weight = weight
        self.signs = {"forward": (1,), "central": (1, -1), "lookahead": (1,)}[owner.difference]
        self.subtracted = owner.difference == "forward"
        self.shards = owner._passes.recorder.shards

    def first(self, run: Callable[[], Tensor], known: Tensor | None) -> tuple[Tensor, Gradients]:
        """The loss, and what the pass at the weights themselves adds to the gradient."""
        # A looked-ahead gradient has the loss's own in it; that of a penalty on the loss comes with its directions.
        pending = known is None and self.owner.difference != "lookahead"
        shared = pending and self.penalty.squares_loss
        # What each rank multiplies by its own number before the mean over ranks has to wait for that.
        waits = self.subtracted and self.shards is not None
        options = {"with_gradients": (shared or self.subtracted) and not waits, "used_up": len(self.signs) == 1}
        with self.owner._passes.first(Phase.PLAIN, **options) as self.sessions:
            loss = run()
            session = self._session(loss)
            self.owner.warn_of_kinks(loss)
            target, described = self._target(loss, session, again=False)
            if waits:
                self._measure(target, described, keep=True)
                plain = self._gradients(float(pending) * loss.mean() - self.share * target)
            else:
                alone = pending and not shared
                plain = self._gradients(loss.mean(), keep=True) if alone else [None] * len(self.trainable)
                found = self._measure(target, described)
                plain = plus(plain, times(found, float(shared) - float(self.subtracted) * self.share))
        return loss.detach() if known is None else known, plain

    def _measure(self, target: Tensor, described: Reduction, keep: bool = False) -> Gradients:
        """Leave directions, and choose the steps along them; gradients of ``target``, if that pass forms them."""
        (session,) = self.sessions
        with session.during(Phase.DIRECTIONS):
            (squared,), found = self._differentiated(target, [session.probe], keep)
        assert squared is not None
        self._choose_steps(session, squared, described)
        return found

    def again(self, run: Callable[[], Tensor], sign: int) -> Gradients:
        """What the pass at the weights displaced by ``sign`` steps adds."""
        (session,) = self.sessions
        assert session.directions is not None
        session.directions.factors = sign * self.steps
        with self.owner._passes.again(self.sessions):
            loss = run()
            target, _ = self._target(loss, session, again=True)
            factor = self.share * sign / len(self.signs)
            if self.shards is not None:
                return self._gradients(target * factor)
            return times(self._gradients(target), factor)

    def _choose_steps(self, session: Session, squared: Tensor, described: Reduction) -> None:
        """Factors ``[m]`` of the rows' gradients ``r_k g_k``, and what the difference is multiplied by."""
        scales = described.factors(session.micro_batches, squared)  # 1 / r_k^2
        norms, count = squared * scales, squared.shape[0]
        self.value = norms.mean()
        if self.penalty.squares_loss:
            self.owner.sq_norms = norms
        # Steps that make r_k e_k the same for all k, so that one number serves all rows of the difference.
        lengths = scales.sqrt() / count
        if self.owner.difference == "lookahead":
            step, share = torch.full_like(self.value, 2 * self.weight), torch.ones_like(self.value)
        else:
            step = self._radius(session) / (lengths.square() * norms).mean().sqrt()
            # A batch without a gradient stays where it is.
            step = torch.where(step.isfinite(), step, torch.zeros_like(step))
            share = torch.where(step > 0, 2 * self.weight / step, torch.zeros_like(step))
        self.steps, self.share = step * lengths * scales.sqrt(), share

    def _radius(self, session: Session) -> Tensor:
        radius = self.owner.radius
        if radius is None:
            # A gather's input is of integers.
            unit = max(torch.finfo(dtype).eps for dtype in session.dtypes if dtype.is_floating_point)
            order = 2 if self.owner.difference == "central" else 1
            radius = (unit / CURVATURE**order) ** (1 / (order + 1))
        return radius * sq_norms(self.trainable).sum().sqrt()

    def _session(self, loss: Tensor) -> Session:
        if len(self.sessions) != 1:
            raise FastregError(
                f"reg: the callable must run the model on one batch, got forwards of {len(self.sessions)} batch sizes"
            )
        check_loss(loss, self.sessions[0].micro_batches.samples)
        return self.sessions[0]

    def _target(self, loss: Tensor, session: Session, again: bool) -> tuple[Tensor, Reduction]:
        """What the penalty squares the gradients of, and how it is reduced."""
        reduction = self.reduction
        if loss.dim():
            # The caller will average; so that the looked-ahead gradient is the whole one, it is done here.
            reduction = Reduction("sum", reduction.scale / loss.shape[0], reduction.counts)
        outputs = first_tensor(self.owner._passes.recorder.outputs)
        return self.penalty.surrogate(loss.mean(), outputs, reduction, session.micro_batches, again=again)

    def _gradients(self, total: Tensor, keep: bool = False) -> Gradients:
        return self._differentiated(total, [], keep)[1]

    def _differentiated(self, total: Tensor, leaves: Sequence[Tensor], keep: bool) -> tuple[Gradients, Gradients]:
        """``grad total`` by leaves and by what is trained, where sharded its mean over ranks."""
        if self.shards is not None:
            return self.shards.gradients(total, leaves, self.trainable, keep)
        found = torch.autograd.grad(total, [*leaves, *self.trainable], retain_graph=keep, allow_unused=True)
        return list(found[: len(leaves)]), list(found[len(leaves) :])


def _check_options(difference: str, radius: float | None, penalties: Sequence[Penalty]) -> None:
    if difference not in DIFFERENCES:
        raise FastregError(f"Regularizer: difference must be one of {DIFFERENCES}, got {difference!r}")
    number = isinstance(radius, (int, float)) and not isinstance(radius, bool)
    if radius is not None and not (number and 0 < radius < float("inf")):
        raise FastregError(f"Regularizer: radius must be a positive number or None, got {radius!r}")
    if difference == "lookahead" and (
        len(penalties) > 1 or not penalties[0].squares_loss or radius is not None
    ):
        raise FastregError(
            "Regularizer: difference='lookahead' takes one GradNorm, whose weight is the radius, got "
            f"{[penalty.name for penalty in penalties]} and radius={radius}"
        )
