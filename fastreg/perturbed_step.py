"""A training step at perturbed weights, one perturbation per micro-batch, in two batched passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastreg.attach import check_model
from fastreg.errors import FastregError
from fastreg.recording import Recorder
from fastreg.rules.perturbation import Perturbation
from fastreg.session import Phase, Session

Closure = Callable[[], Tensor]


class PerturbedStep:
    """Runs a closure twice: at the weights, and at ``w + c_k G_k`` for every micro-batch k at once.

    ``G_k`` is the gradient of the summed loss of micro-batch k as the closure scales it. The first run forms no
    parameter gradient; the second leaves the mean gradient of the perturbed micro-batches in ``.grad``. Both draw the
    same random numbers, and buffers (batch norm statistics) are as after the first.

    Args:
        model: run by the closure; recorded only inside :meth:`__call__`.
        micro_batch_size: b, samples per micro-batch.
        parameters: those that are perturbed.
        factors: takes the squared norms ``||G_k||^2 [m]`` of one forward and returns ``c_k [m]``.
        adaptive: as for :class:`fastreg.rules.perturbation.Perturbation`.
    """

    def __init__(
        self,
        model: nn.Module,
        micro_batch_size: int,
        parameters: Iterable[nn.Parameter],
        factors: Callable[[Tensor], Tensor],
        adaptive: bool = False,
    ) -> None:
        check_model(model)
        self.model, self.factors, self.adaptive = model, factors, adaptive
        self._running = False
        self._recorder = Recorder(model, micro_batch_size, parameters, lambda: self._running)
        self._devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})

    def remove(self) -> None:
        """Detach from the model."""
        self._recorder.remove()

    def __call__(self, closure: Closure) -> Tensor:
        """The loss at the unperturbed weights.

        Raises:
            FastregError: the closure does not run the model and a backward, or does so differently the second time.
        """
        with torch.enable_grad(), _same_random_numbers(self._devices) as rewind:
            sessions: list[Session] = []
            with self._recording(Phase.DIRECTIONS, sessions.append), self._without_reduction():
                loss = closure()
            perturbations = [self._perturbation(session) for session in sessions]
            if not perturbations:
                raise FastregError("step: the closure must run the model in training mode, got no forward of it")
            rewind()
            with self._recording(Phase.PLAIN, _in_turn(perturbations, sessions)), _buffers_kept(self.model):
                closure()
        return loss.detach()

    @contextmanager
    def _recording(self, phase: Phase, on_open: Callable[[Session], None]) -> Iterator[None]:
        def prepare(session: Session) -> None:
            session.first_order = True
            if phase is Phase.DIRECTIONS:
                session.directions = Perturbation(self.adaptive)
            on_open(session)

        self._running, self._recorder.phase, self._recorder.on_open = True, phase, prepare
        try:
            yield
        finally:
            self._running, self._recorder.session = False, None

    def _perturbation(self, session: Session) -> Perturbation:
        squared = session.probe.grad
        if squared is None:
            raise FastregError("step: the closure must run a backward for each forward of the model, got none for one")
        session.directions.factors = self.factors(squared)
        return session.directions

    def _without_reduction(self) -> object:
        """Ranks perturb along their own gradients, so the first pass has nothing to exchange."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()


def _in_turn(perturbations: list[Perturbation], first: list[Session]) -> Callable[[Session], None]:
    """Gives every forward of the second pass the perturbation of its counterpart in the first."""
    remaining = list(zip(perturbations, first, strict=True))

    def perturb(session: Session) -> None:
        if not remaining or remaining[0][1].micro_batches.samples != session.micro_batches.samples:
            raise FastregError(
                "step: the closure must run the same forwards on the same batches both times, got another one of "
                f"{session.micro_batches.samples} samples (draw the batch outside the closure)"
            )
        session.perturbation = remaining.pop(0)[0]

    return perturb


@contextmanager
def _same_random_numbers(devices: list[int]) -> Iterator[Callable[[], None]]:
    """A function that sets torch's generators back to where they were."""
    cpu, cuda = torch.get_rng_state(), [torch.cuda.get_rng_state(index) for index in devices]

    def rewind() -> None:
        torch.set_rng_state(cpu)
        for index, state in zip(devices, cuda, strict=True):
            torch.cuda.set_rng_state(state, index)

    yield rewind


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undo what happens to the model's buffers inside the block."""
    kept = [(buffer, buffer.clone(), buffer._version) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before, version in kept:
                if buffer._version != version:
                    buffer.copy_(before)
