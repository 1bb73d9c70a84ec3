"""Squared gradient norms of the micro-batches within a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fastreg.attach import check_model
from fastreg.chain import squared_norms
from fastreg.cross_entropy import drawn_cross_entropy
from fastreg.errors import FastregError
from fastreg.loss import Reduction, first_tensor
from fastreg.monitor.noise import Number
from fastreg.monitor.sources import Backward, Source, check_passes
from fastreg.recording import Recorder
from fastreg.session import Phase, Session


class MicroBatchSource(Source):
    """Micro-batches of ``size`` samples, recorded while the model runs; outputs and gradients stay torch's own.

    Attributes:
        fisher: when a list, one estimate of the Fisher trace per forward is left there.
        turn: forwards of which a part was measured.
    """

    kept = ("seed", "draws", "turn")

    def __init__(self, model: nn.Module, size: int, fraction: float, per_layer: bool, seed: int | None) -> None:
        check_model(model, differentiated_twice=False)
        super().__init__(model)
        self._per_layer, self._fraction, self.turn = per_layer, fraction, 0
        self._sessions: list[Session] = []
        self._reached: list[None] = []
        self._recorder = Recorder(
            model, size, self.parameters, lambda: self.on and model.training, phase=Phase.STATISTICS
        )
        self._recorder.on_open = self._open
        self.fisher: list[Tensor] | None = None
        # Torch's seeds have 64 bits, an operator's integers 63 and a sign.
        self.seed, self.draws = (torch.initial_seed() if seed is None else seed) % 2**63, 0

    def trace_fisher(self) -> None:
        """Estimate the Fisher trace after every forward, by one more pass of input gradients."""
        self.fisher, self._recorder.on_outputs = [], self._draw

    def take(self, reduction: Reduction, by_layer: Callable[[Tensor], Tensor]) -> list[Backward]:
        sessions, self._sessions = self._sessions, []
        for session in sessions:
            session.consumed = True
        done = [one for one in sessions if one.probe.grad is not None]
        backwards = len(self._reached)
        self._reached.clear()
        check_passes(backwards, len(done))
        return [self._backward(one, reduction, by_layer) for one in done]

    def _open(self, session: Session) -> None:
        session.first_order = session.beside = True
        session.per_parameter = {} if self._per_layer else None
        selected = self._in_turn(session.micro_batches.count)
        if selected is not None:
            session.restrict(selected)
        # Not self: the probe would close a cycle.
        reached = self._reached
        session.probe.register_post_accumulate_grad_hook(lambda _: reached.append(None))
        self._sessions.append(session)

    def _in_turn(self, count: int) -> tuple[int, ...] | None:
        """The micro-batches to measure, neighbours, whose rows are views; None for all. Every one has its turn."""
        measured = max(1, round(self._fraction * count))
        if measured == count:
            return None
        start = min(self.turn % -(-count // measured) * measured, count - measured)
        self.turn += 1
        return tuple(range(start, start + measured))

    def _backward(self, session: Session, reduction: Reduction, by_layer: Callable[[Tensor], Tensor]) -> Backward:
        cut, squared, pick = session.micro_batches, session.probe.grad, session.pick(norms_alone=True)
        assert squared is not None  # the passes taken are those that have run
        factors = reduction.factors(cut, squared)
        if session.per_parameter is not None:
            zero = torch.zeros_like(squared)
            each = [session.per_parameter.get(id(p), zero) for p in self._recorder.parameters]
            squared = by_layer(torch.stack(each, 1).to(squared.dtype))
        else:
            squared = squared.unsqueeze(1)
        if reduction.counts is None:
            kept = pick.kept
            samples: Number = cut.samples
            inverse: Number = kept.full / kept.size + (1 / kept.tail if kept.tail else 0)
        else:
            sizes = reduction.sizes(cut, squared)
            samples, inverse = sizes.sum(), (1 / pick.take_segments(sizes)).sum()
        return Backward(samples, squared * pick.take_segments(factors).unsqueeze(1), inverse)

    @torch.enable_grad()
    def _draw(self, session: Session, outputs: object) -> None:
        logits = first_tensor(outputs)
        if logits is None or not logits.is_floating_point() or logits.dim() < 2:
            got = None if logits is None else (logits.dtype, tuple(logits.shape))
            raise FastregError(f"Monitor: fisher_trace needs a model whose outputs are logits [B, ..., C], got {got}")
        losses, labels = drawn_cross_entropy(logits.flatten(0, -2), self.seed, self.draws)
        self.draws += 1
        kept, session.per_parameter = session.per_parameter, None
        shards = self._recorder.shards
        with nullcontext() if shards is None else shards.waiting():
            squared = squared_norms(session, losses.sum(), differentiable=False)
        session.per_parameter = kept
        measured = session.pick(norms_alone=True).kept.samples * (labels.numel() // session.micro_batches.samples)
        assert self.fisher is not None
        self.fisher.append(squared.sum() / measured)

    def remove(self) -> None:
        self._recorder.remove()
        self._sessions.clear()
