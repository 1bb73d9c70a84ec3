"""Where squared gradient norms come from: micro-batches within a backward pass, or whole backward passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fastreg.attach import check_model
from fastreg.chain import squared_norms
from fastreg.cross_entropy import drawn_cross_entropy
from fastreg.errors import FastregError
from fastreg.loss import Reduction, first_tensor
from fastreg.recording import Recorder, batch_size
from fastreg.session import Phase, Session


@dataclass(frozen=True)
class Backward:
    """What one backward pass left.

    Attributes:
        samples: B_j, those of its batch; counted if the loss is a mean over counts.
        squared: ``||g_k||^2`` of its micro-batches by layer, ``[m, L]``; one column if layers are not told apart.
        inverse: sum over its micro-batches of ``1 / b_k``.
    """

    samples: float | Tensor
    squared: Tensor
    inverse: float | Tensor


class Source(ABC):
    """Collects backward passes between two reads.

    Attributes:
        on: whether it collects those to come.
        parameters: those whose gradients the norms are made of.
    """

    def __init__(self, model: nn.Module) -> None:
        self.on = True
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._frozen = [p for p in model.parameters() if not p.requires_grad]

    def check_parameters(self) -> None:
        """Refuse gradients that nothing was attached for.

        Raises:
            FastregError: a parameter was frozen when the monitor was built, and no longer is.
        """
        thawed = sum(p.requires_grad for p in self._frozen)
        if thawed:
            raise FastregError(
                "Monitor.step: parameters that require grad must have done so when the monitor was built, got "
                f"{thawed} that did not (remove() it, build another and hand it the state_dict())"
            )

    @abstractmethod
    def take(self, reduction: Reduction, by_layer: Callable[[Tensor], Tensor]) -> list[Backward]:
        """The backward passes since the last call; ``by_layer`` adds ``[..., P]`` up to ``[..., L]``."""

    @abstractmethod
    def remove(self) -> None:
        """Detach from the model."""


class MicroBatchSource(Source):
    """Micro-batches of ``size`` samples, recorded while the model runs; outputs and gradients stay torch's own.

    Attributes:
        fisher: when a list, one estimate of the Fisher trace per forward is left there.
    """

    def __init__(self, model: nn.Module, size: int, per_layer: bool, seed: int | None) -> None:
        check_model(model, differentiated_twice=False)
        super().__init__(model)
        self._per_layer = per_layer
        self._sessions: list[Session] = []
        self._reached: list[None] = []
        self._recorder = Recorder(
            model, size, model.parameters(), lambda: self.on and model.training, phase=Phase.STATISTICS
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
        _check_passes(backwards, len(done))
        return [self._backward(one, reduction, by_layer) for one in done]

    def _open(self, session: Session) -> None:
        reached = self._reached  # Not self: the probe would close a cycle.
        session.probe.register_post_accumulate_grad_hook(lambda _: reached.append(None))
        session.first_order = session.beside = True
        session.per_parameter = {} if self._per_layer else None
        self._sessions.append(session)

    def _backward(self, session: Session, reduction: Reduction, by_layer: Callable[[Tensor], Tensor]) -> Backward:
        cut, squared = session.micro_batches, session.probe.grad
        factors = reduction.factors(cut, squared).unsqueeze(1)
        if self._per_layer:
            zero = torch.zeros_like(squared)
            each = [session.per_parameter.get(id(p), zero) for p in self.parameters]
            squared = by_layer(torch.stack(each, 1).to(squared.dtype))
        else:
            squared = squared.unsqueeze(1)
        if reduction.counts is None:
            samples, inverse = cut.samples, cut.full / cut.size + (1 / cut.tail if cut.tail else 0)
        else:
            sizes = reduction.sizes(cut, squared)
            samples, inverse = sizes.sum(), (1 / sizes).sum()
        return Backward(samples, squared * factors, inverse)

    @torch.enable_grad()
    def _draw(self, session: Session, outputs: object) -> None:
        logits = first_tensor(outputs)
        if logits is None or not logits.is_floating_point() or logits.dim() < 2:
            got = None if logits is None else (logits.dtype, tuple(logits.shape))
            raise FastregError(f"Monitor: fisher_trace needs a model whose outputs are logits [B, ..., C], got {got}")
        losses, labels = drawn_cross_entropy(logits.flatten(0, -2), self.seed, self.draws)
        self.draws += 1
        kept, session.per_parameter = session.per_parameter, None
        squared = squared_norms(session, losses.sum(), differentiable=False)
        session.per_parameter = kept
        self.fisher.append(squared.sum() / labels.numel())

    def remove(self) -> None:
        self._recorder.remove()
        self._sessions.clear()


class BackwardSource(Source):
    """Every backward pass is one micro-batch: those of accumulation, or of ranks. Works with any model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._model, self._samples, self._forwards, self._pass = model, 0, 0, -1
        self._passes: list[tuple[int, dict[int, Tensor]]] = []
        self._handles = [p.register_hook(partial(self._square, i)) for i, p in enumerate(self.parameters)]
        self._handles.append(model.register_forward_pre_hook(self._count, with_kwargs=True))

    def _count(self, _model: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.is_grad_enabled() and self._model.training and torch._C._current_graph_task_id() == -1:
            self._samples = batch_size(args, kwargs)
            self._forwards += 1

    def _square(self, number: int, gradient: Tensor) -> None:
        if not self.on or not self._model.training:
            return
        task = torch._C._current_graph_task_id()
        if task != self._pass or not self._passes:
            self._pass = task
            self._passes.append((self._samples, {}))
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        norm = torch.linalg.vector_norm(gradient.detach(), dtype=dtype)
        self._passes[-1][1][number] = norm.square()

    def take(self, reduction: Reduction, by_layer: Callable[[Tensor], Tensor]) -> list[Backward]:
        passes, self._passes = self._passes, []
        if reduction.counts is not None:
            raise FastregError("Monitor.step: counts go with micro_batch_size=b, got them with None")
        forwards, self._forwards = self._forwards, max(self._forwards - len(passes), 0)
        _check_passes(len(passes), forwards)
        return [self._backward(samples, found, reduction, by_layer) for samples, found in passes]

    def _backward(
        self, samples: int, found: dict[int, Tensor], reduction: Reduction, by_layer: Callable[[Tensor], Tensor]
    ) -> Backward:
        zero = torch.zeros_like(next(iter(found.values())))
        squared = torch.stack([found.get(i, zero) for i in range(len(self.parameters))])
        total = samples if reduction.kind == "sum" else 1
        return Backward(samples, by_layer(squared.unsqueeze(0)) / (reduction.scale * total) ** 2, 1 / samples)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._passes.clear()


def _check_passes(backwards: int, forwards: int) -> None:
    """The squares of the parts of a gradient do not add up to its square."""
    if backwards > forwards:
        raise FastregError(
            f"Monitor.step: every forward must have one backward pass, got {backwards} for {forwards} (add losses up "
            "before backward; call checkpoint with use_reentrant=False)"
        )
