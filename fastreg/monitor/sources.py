"""What a monitor reads squared gradient norms from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from fastreg.errors import FastregError
from fastreg.loss import Reduction
from fastreg.sharding import own_parameters


@dataclass(frozen=True)
class Backward:
    """What one backward pass left.

    Attributes:
        samples: B_j, those of its batch; counted if the loss is a mean over counts.
        squared: ``||g_k||^2`` of its measured micro-batches by layer, ``[m, L]``; one column if layers are not told
            apart.
        inverse: sum over those of ``1 / b_k``.
    """

    samples: float | Tensor
    squared: Tensor
    inverse: float | Tensor


class Source(ABC):
    """Collects backward passes between two reads.

    Attributes:
        on: whether it collects those to come.
        parameters: those whose gradients the norms are made of.
        kept: names of attributes that a checkpoint must hold.
    """

    kept: tuple[str, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        self.on = True
        every = own_parameters(model)
        self.parameters = [p for p in every if p.requires_grad]
        self._frozen = [p for p in every if not p.requires_grad]

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

    def state_dict(self) -> dict[str, int]:
        """What its next choices depend on."""
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore :meth:`state_dict`; what a source of another kind kept means nothing to this one."""
        for name in state.keys() & set(self.kept):
            setattr(self, name, state[name])

    @abstractmethod
    def remove(self) -> None:
        """Detach from the model."""


def check_passes(backwards: int, forwards: int) -> None:
    """The squares of the parts of a gradient do not add up to its square."""
    if backwards > forwards:
        raise FastregError(
            f"Monitor.step: every forward must have one backward pass, got {backwards} for {forwards} (add losses up "
            "before backward; call checkpoint with use_reentrant=False)"
        )
