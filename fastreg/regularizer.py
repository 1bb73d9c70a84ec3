"""The regularizer: ``loss = reg(loss)``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from fastreg.attach import check_model
from fastreg.errors import FastregError
from fastreg.graph_walk import refuse_offenders
from fastreg.hosted import hosted
from fastreg.loss import Reduction, check_loss, first_tensor
from fastreg.penalties.base import Coefficient, Penalty, Step, metrics
from fastreg.perturbed_penalty import PerturbedPenalty
from fastreg.recording import Recorder
from fastreg.self_check import self_check
from fastreg.session import Session


class Regularizer:
    """Adds explicit regularizers to any training loop in one line.

    After ``loss = reg(loss)`` the value is that of the loss, and its gradient is that of

        loss + sum_p weight_p R_p

    exactly, for all micro-batches in one batched pass. ``C`` is the mean loss over the batch's B samples, cut into
    ``m = ceil(B / micro_batch_size)`` consecutive micro-batches (the last may be smaller); ``g_k`` is the gradient
    of the mean loss of micro-batch k's own samples; each R averages over the m micro-batches with equal weights.

    The model is neither wrapped nor changed: removable forward hooks record its forward pass while it is in
    training mode with gradients enabled. Otherwise, and when ``reg.enabled`` is False, ``reg`` is the identity.

    Args:
        model: the module to be called in the loop. Samples lie along dimension 0 of its input.
        penalty: a penalty or a sequence of them.
        micro_batch_size: b, samples per micro-batch, at least 1; beyond B it means one micro-batch.
        every: apply the penalties at every ``every``-th call with their weight times ``every``.
        fraction: estimate each R, without bias, from a random ``ceil(fraction * m)`` of the micro-batches.
        check: verify the first regularized step: walk its graph for operations that are silently wrong under double
            backward, and compare norms and penalty gradient of one micro-batch with plain autograd. It costs about
            two more double backwards, once.
        parameters: the parameters whose gradients the norms are made of; all that require grad by default.
        seed: seed of the choice that ``fraction`` makes; None takes it from ``torch.initial_seed()``.
        method: ``"exact"``, a double backward; or ``"perturb"``, gradients at perturbed weights, of first order alone:
            ``reg`` then takes a callable that runs model and loss, and calls it two or three times (same random
            numbers; batch norm statistics move once). Fused attention, ``torch.compile`` and reentrant checkpointing
            work with it. On networks with kinks (ReLU) it is not the gradient of the penalty that holds almost
            everywhere; bench/NOTES.md, "Perturbed penalties", has errors by dtype and activation.
        difference: for ``"perturb"``: ``"forward"`` or ``"central"`` finite differences, or ``"lookahead"``, the
            gradient at ``w + 2 weight g_k`` (see :mod:`fastreg.perturbed_penalty`).
        radius: for finite differences: root mean square displacement in units of ``||w||``; None suits the dtype.

    Attributes:
        metrics: of the last regularized call: ``fastreg/<penalty>`` (its R), ``fastreg/penalty`` (the sum of
            ``weight * R``), as 0-d tensors on the model's device.
        sq_norms: ``||g_k||^2`` of the last regularized call, ``[m]``, or None if no penalty asked for it.
        enabled: set it to False to switch recording and penalties off.

    Raises:
        FastregError: an argument is out of range; the model is compiled, or synchronises batch norm statistics.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=0.01), micro_batch_size=4)
        >>> x, y = torch.randn(16, 4), torch.randint(2, (16,))
        >>> loss = reg(torch.nn.functional.cross_entropy(model(x), y))
        >>> loss.backward()
        >>> sorted(reg.metrics)
        ['fastreg/grad_norm', 'fastreg/penalty']
    """

    def __init__(
        self,
        model: nn.Module,
        penalty: Penalty | Sequence[Penalty],
        *,
        micro_batch_size: int,
        every: int = 1,
        fraction: float = 1.0,
        check: bool = True,
        parameters: Iterable[nn.Parameter] | None = None,
        seed: int | None = None,
        method: str = "exact",
        difference: str = "forward",
        radius: float | None = None,
    ) -> None:
        self.penalties = _penalties(penalty)
        _at_least_one("micro_batch_size", micro_batch_size)
        for one in self.penalties:
            one.policy(micro_batch_size)  # Refuses one that does not fit.
        _at_least_one("every", every)
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise FastregError(f"Regularizer: fraction must be in (0, 1], got {fraction!r}")
        if method not in ("exact", "perturb"):
            raise FastregError(f"Regularizer: method must be 'exact' or 'perturb', got {method!r}")
        self.model, self.micro_batch_size, self.every, self.fraction = model, micro_batch_size, every, fraction
        self.check, self.enabled = check, True
        self.metrics: dict[str, Tensor] = {}
        self.sq_norms: Tensor | None = None
        self._calls = 0
        self._checked = False
        self._choice = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
        tracked = list(model.parameters() if parameters is None else parameters)
        self._perturbed: PerturbedPenalty | None = None
        if method == "perturb":
            _check_perturbed(model, tracked, fraction)
            self._perturbed = PerturbedPenalty(model, micro_batch_size, tracked, self.penalties, difference, radius)
            self._recorder = self._perturbed.recorder
            self._recorder.owner = self
            return
        check_model(model)
        self._recorder = Recorder(model, micro_batch_size, tracked, self._active)
        self._recorder.owner, self._recorder.keeps_outputs = self, check
        self._recorder.on_open = self._open

    def __call__(
        self,
        loss: Tensor | Callable[[], Tensor],
        outputs: object = None,
        *,
        scale: float = 1.0,
        counts: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The loss, with the penalties' gradient added to its own.

        Args:
            loss: the loss of the model's last forward: a scalar, or one loss per sample ``[B]`` (to be averaged
                by the caller). A callable is called for it.
            outputs: the model's outputs; penalties that draw labels need them.
            scale: what the loss was multiplied by (``1/n`` under accumulation over n batches, ``scaler.get_scale()``
                of a GradScaler: float16 keeps most digits if the loss is scaled first). R is computed for the loss
                before scaling, and the penalty is multiplied by ``scale`` as the loss was.
            counts: tokens per sample ``[B]`` for a loss that is a mean over tokens: ``C_k`` is then the sum of
                k's token losses over the sum of k's counts. For class weights they are ``weight[targets]``.
            reduction: ``"mean"``, or ``"sum"`` if the scalar is the sum over samples. ``g_k`` is in both cases the
                gradient of the micro-batch mean, and ``weight * R`` is added to the loss as passed.

        Returns:
            A tensor equal to ``loss``.

        Raises:
            FastregError: the loss does not fit the recorded forward, or the first step's checks fail.
        """
        if self._perturbed is not None:
            return self._by_perturbation(self._perturbed, loss, Reduction(reduction, scale, counts))
        if not isinstance(loss, Tensor) and callable(loss):
            loss = loss()
        if not self._active() or not torch.is_grad_enabled():
            return loss
        session = self._take_session()
        check_loss(loss, session.micro_batches.samples)
        due, coefficients = self._due(), hosted(self._advance)
        if not due:
            return loss
        step = Step(session, loss, first_tensor(outputs), Reduction(reduction, scale, counts), self._differentiated())
        if self.check and not self._checked:
            refuse_offenders(loss, session, self._recorder.tracked_names())
            self._checked = self_check(step, self._recorder)
            self._recorder.keeps_outputs = not self._checked
        session.selected = self._choose(session.micro_batches.count)
        penalty = self._penalty(step, coefficients) * scale
        return loss + (penalty - penalty.detach()).to(loss.dtype)

    def _by_perturbation(
        self, passes: PerturbedPenalty, run: Tensor | Callable[[], Tensor], reduction: Reduction
    ) -> Tensor:
        if isinstance(run, Tensor) or not callable(run):
            raise FastregError(
                "reg: method='perturb' must be given a callable, which it calls at several weights, got "
                f"{type(run).__name__} (loss = reg(lambda: loss_fn(model(x), y)))"
            )
        if not self._active() or not torch.is_grad_enabled():
            return run()
        due, coefficients = self._due(), self._advance()
        if not due:
            return run()
        loss = passes(run, reduction, [float(own.weight) * self.every for own in coefficients])
        self._note(passes.values, passes.sq_norms, coefficients)
        return loss

    def remove(self) -> None:
        """Detach from the model; afterwards ``reg`` is the identity."""
        self._recorder.remove()
        self.enabled = False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for a bit-identical continuation: counters and random generators."""
        return {
            "calls": self._calls,
            "choice": self._choice.get_state(),
            "penalties": [penalty.state_dict() for penalty in self.penalties],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        if len(state["penalties"]) != len(self.penalties):
            raise FastregError(
                f"load_state_dict: penalties must be {len(self.penalties)}, as in this Regularizer, got "
                f"{len(state['penalties'])} (build it as it was built when the state was saved)"
            )
        self._calls = state["calls"]
        self._choice.set_state(state["choice"])
        for penalty, saved in zip(self.penalties, state["penalties"]):
            penalty.load_state_dict(saved)

    def plan(self) -> tuple[bool, Hashable]:
        """Of the next call in a compiled step: whether it must run eagerly, and what Python will decide in it.

        Raises:
            FastregError: it decides something anew in every step.
        """
        if self._perturbed is not None or self.fraction != 1:
            raise FastregError(
                "compile: a Regularizer must have method='exact' and fraction=1 inside a compiled function, got "
                f"method={'exact' if self._perturbed is None else 'perturb'!r} and fraction={self.fraction}"
            )
        due = self._active() and self._due()
        unchecked = self.check and not self._checked
        constants = tuple(one.constants for one in self.penalties) if due else ()
        return due and (unchecked or any(one.eager_next for one in self.penalties)), (due, self.enabled, constants)

    def _active(self) -> bool:
        return self.enabled and self.model.training

    def _take_session(self) -> Session:
        session = self._recorder.session
        if session is None or session.consumed:
            raise FastregError(
                "reg: the model must have run forward, in training mode with gradients enabled, since the last call "
                f"of reg, got {'no forward' if session is None else 'a second call for one forward'} (call the "
                "model, compute the loss, call reg once; several penalties go in one Regularizer)"
            )
        session.consumed = True
        return session

    def _choose(self, count: int) -> tuple[int, ...] | None:
        if self.fraction == 1.0:
            return None
        kept = max(1, -int(-self.fraction * count // 1))
        chosen = torch.randperm(count, generator=self._choice)[:kept]
        return tuple(sorted(chosen.tolist()))

    def _open(self, session: Session) -> None:
        for penalty in self.penalties:
            penalty.open(session)

    def _differentiated(self) -> tuple[Tensor, ...]:
        """What the gradient of the batch is wanted of."""
        if not any(penalty.needs_gradient for penalty in self.penalties):
            return ()
        return tuple(p for p in self._recorder.parameters if p.requires_grad)

    def _penalty(self, step: Step, coefficients: Sequence[Coefficient]) -> Tensor:
        for penalty in self.penalties:
            penalty.prepare(step)
        values = [penalty.value(step) for penalty in self.penalties]
        known = step.sq_norms.detach() if "sq_norms" in step.__dict__ else None
        self._note([value.detach() for value in values], known, coefficients)
        # Times every: which keeps the mean over steps.
        weighted = (own.weight * self.every * value for own, value in zip(coefficients, values, strict=True))
        return reduce(torch.add, weighted)

    def _due(self) -> bool:
        """Whether the next call applies the penalties."""
        return self._calls % self.every == 0

    def _advance(self) -> list[Coefficient]:
        """Count a call; the coefficients at it."""
        policies, step = [one.policy(self.micro_batch_size) for one in self.penalties], self._calls
        self._calls += 1
        return [Coefficient(policy.at(step), policy.rule_ratio(step)) for policy in policies]

    def _note(self, values: Sequence[Tensor], sq_norms: Tensor | None, coefficients: Sequence[Coefficient]) -> None:
        self.metrics = metrics(self.penalties, values, coefficients)
        self.sq_norms = sq_norms


def _penalties(penalty: Penalty | Sequence[Penalty]) -> tuple[Penalty, ...]:
    penalties = (penalty,) if isinstance(penalty, Penalty) else tuple(penalty)
    if not penalties or not all(isinstance(one, Penalty) for one in penalties):
        raise FastregError(f"Regularizer: penalty must be a Penalty or a non-empty sequence of them, got {penalty!r}")
    return penalties


def _check_perturbed(model: nn.Module, tracked: list[nn.Parameter], fraction: float) -> None:
    known = {id(p) for p in tracked}
    if fraction != 1.0 or any(p.requires_grad and id(p) not in known for p in model.parameters()):
        raise FastregError(
            "Regularizer: method='perturb' must have fraction=1 and all parameters of the model that require grad, got "
            f"fraction={fraction} and {len(known)} parameters"
        )


def _at_least_one(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FastregError(f"Regularizer: {name} must be an integer >= 1, got {value!r}")
