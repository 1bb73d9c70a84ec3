"""Lengths that a step can be given: one, or the gradient norm of a micro-batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastreg.attach import check_model
from fastreg.errors import FastregError
from fastreg.loss import Reduction
from fastreg.ranks import axes
from fastreg.recording import Recorder
from fastreg.session import Phase, Session
from fastreg.sharding import own_parameters


class Magnitude(ABC):
    """Gives the length of the gradient of every step of a :class:`fastreg.optim.Grafted`."""

    @abstractmethod
    def __call__(self, described: Reduction) -> float | Tensor:
        """``n_t`` of the step to come, 0-d; ``described`` says how the last loss was reduced."""

    def attach(self, parameters: Sequence[Tensor]) -> None:
        """Get ready for steps of these parameters."""

    def remove(self) -> None:
        """Undo :meth:`attach`."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for the next lengths to be the same."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""


class UnitNorm(Magnitude):
    """``n_t = 1``: normalised gradient descent, the learning rate is the length of the step.

    Source: Novack et al. 2022, arXiv:2211.15853.

    Example:
        >>> import torch, fastreg.optim
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = fastreg.optim.Grafted(torch.optim.SGD([weight], lr=1.0), fastreg.optim.UnitNorm())
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.detach()
        tensor([2.4000, 3.2000])
    """

    def __call__(self, described: Reduction) -> float:
        return 1.0


class MicroBatchNorm(Magnitude):
    r"""``n_t = ||g_k||``, exactly, of one micro-batch drawn anew at every forward: iterative grafting.

        g_k = grad (1/b) sum_{i in k} l_i,      k one of ceil(B / b) consecutive micro-batches, each as likely

    The norm rides on the training backward; the other micro-batches' norms are not computed. Batch norm layers
    normalise every micro-batch by its own statistics, as small-batch training would. Under accumulation k is one of
    the last backward's, so with b >= B it is that whole batch. Under DistributedDataParallel and ``fully_shard`` all
    ranks take the norm of the first, whose data are as good as any.

    Args:
        model: recorded while it is in training mode with gradients enabled.
        micro_batch_size: b, samples per micro-batch; the last of a batch may be smaller.
        seed: of the draw; None takes it from ``torch.initial_seed()``.

    Raises:
        FastregError: an argument is out of range; as :class:`fastreg.Regularizer` for models; the base optimizer holds
            parameters of others; at the step: not exactly one backward of the last forward has run since the last.

    Source: Novack et al. 2022, arXiv:2211.15853.

    Example:
        >>> import torch, fastreg.optim
        >>> model = torch.nn.Linear(3, 2)
        >>> magnitude = fastreg.optim.MicroBatchNorm(model, micro_batch_size=2, seed=0)
        >>> optimizer = fastreg.optim.Grafted(torch.optim.SGD(model.parameters(), lr=0.1), magnitude)
        >>> torch.nn.functional.cross_entropy(model(torch.randn(8, 3)), torch.randint(2, (8,))).backward()
        >>> optimizer.step()
    """

    def __init__(self, model: nn.Module, micro_batch_size: int, seed: int | None = None) -> None:
        size = micro_batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise FastregError(f"MicroBatchNorm: micro_batch_size must be an integer >= 1, got {size!r}")
        self.model, self.micro_batch_size = model, size
        self._generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
        self._recorder: Recorder | None = None
        self._reached: list[None] = []

    def attach(self, parameters: Sequence[Tensor]) -> None:
        """Record the model; norms are over ``parameters``."""
        check_model(self.model, differentiated_twice=False)
        strangers = {id(p) for p in parameters} - {id(p) for p in own_parameters(self.model)}
        if strangers:
            raise FastregError(
                f"MicroBatchNorm: base_optimizer must hold parameters of model alone, got {len(strangers)} of others "
                "(pass the module that owns them all)"
            )
        self._recorder = Recorder(
            self.model,
            self.micro_batch_size,
            cast(Sequence[nn.Parameter], parameters),  # the model's, as was checked
            lambda: self.model.training,
            phase=Phase.STATISTICS,
        )
        self._recorder.on_open = self._draw

    def remove(self) -> None:
        if self._recorder is not None:
            self._recorder.remove()
            self._recorder = None

    def __call__(self, described: Reduction) -> Tensor:
        if len(self._reached) != 1:
            raise FastregError(
                "MicroBatchNorm: one backward of the model's last forward must have run since the last step, got "
                f"{len(self._reached)} (add losses up before backward; is the model in training mode?)"
            )
        self._reached = []
        assert self._recorder is not None
        session = self._recorder.last
        squared = session.probe.grad
        assert squared is not None  # the backward that was counted has left it
        factors = described.factors(session.micro_batches, squared)
        norm = (squared * session.pick(norms_alone=True).take_segments(factors)).sqrt()
        for group in axes(self.model):
            dist.broadcast(norm, group=group, group_src=0)
        return norm.squeeze()

    def _draw(self, session: Session) -> None:
        """Choose the micro-batch before anything is recorded, so that it alone is measured."""
        session.first_order = True
        session.restrict((int(torch.randint(session.micro_batches.count, (), generator=self._generator)),))
        # Not self: the probe would close a cycle.
        reached: list[None] = []
        self._reached = reached
        session.probe.register_post_accumulate_grad_hook(lambda _: reached.append(None))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.model, self.micro_batch_size), self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state)
