"""Forwards and backwards at weights that differ between micro-batches, after ones that say in which directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastreg.attach import buffers_kept, check_model
from fastreg.errors import FastregError
from fastreg.recording import Recorder
from fastreg.rules.perturbation import Perturbation
from fastreg.session import Phase, Session


class PerturbedPasses:
    """Records what runs inside :meth:`first` and :meth:`again`; nothing else of the model.

    Args:
        model: recorded only inside.
        micro_batch_size: b, samples per micro-batch.
        parameters: those that are perturbed.
        adaptive: as for :class:`fastreg.rules.perturbation.Perturbation`.
    """

    def __init__(
        self, model: nn.Module, micro_batch_size: int, parameters: Iterable[nn.Parameter], adaptive: bool = False
    ) -> None:
        check_model(model, differentiated_twice=False)
        self.model, self.adaptive = model, adaptive
        self._running = False
        self.recorder = Recorder(model, micro_batch_size, parameters, lambda: self._running)
        self._devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})

    def remove(self) -> None:
        """Detach from the model."""
        self.recorder.remove()

    @contextmanager
    def first(
        self, phase: Phase, *, with_gradients: bool = False, used_up: bool = False
    ) -> Iterator[list[Session]]:
        """The pass at the weights themselves, whose backwards in the phase ``DIRECTIONS`` leave directions.

        Args:
            phase: what ordinary backwards compute.
            with_gradients: whether those that leave directions form parameter gradients too.
            used_up: whether one pass at perturbed weights is all that follows.

        Yields:
            The sessions of its forwards, with a perturbation each, whose factors are not known yet.
        """
        sessions: list[Session] = []

        def prepare(session: Session) -> None:
            session.first_order = True
            session.directions = Perturbation(self.adaptive, with_gradients, used_up)
            sessions.append(session)

        with self._recording(phase, prepare), self._without_reduction():
            yield sessions
        if not sessions:
            raise FastregError("step: the model must run in training mode, got no forward of it")

    @contextmanager
    def again(self, first: list[Session]) -> Iterator[None]:
        """The pass at perturbed weights: every forward has its counterpart in the first one. Buffers are kept."""
        remaining = list(first)

        def perturb(session: Session) -> None:
            if not remaining or remaining[0].micro_batches.samples != session.micro_batches.samples:
                raise FastregError(
                    "step: the same forwards must run on the same batches both times, got another one of "
                    f"{session.micro_batches.samples} samples (draw the batch outside the closure)"
                )
            session.first_order, session.perturbation = True, remaining.pop(0).directions

        with self._recording(Phase.PLAIN, perturb), buffers_kept(self.model):
            yield

    @contextmanager
    def same_random_numbers(self) -> Iterator[Callable[[], None]]:
        """Yields a function that sets torch's generators back to where they were."""
        cpu, cuda = torch.get_rng_state(), [torch.cuda.get_rng_state(index) for index in self._devices]

        def rewind() -> None:
            torch.set_rng_state(cpu)
            for index, state in zip(self._devices, cuda, strict=True):
                torch.cuda.set_rng_state(state, index)

        yield rewind

    @contextmanager
    def _recording(self, phase: Phase, on_open: Callable[[Session], None]) -> Iterator[None]:
        self._running, self.recorder.phase, self.recorder.on_open = True, phase, on_open
        try:
            yield
        finally:
            self._running, self.recorder.session = False, None

    def _without_reduction(self) -> AbstractContextManager[Any]:
        """Ranks perturb along their own gradients, so the first pass has nothing to exchange."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()
