"""One recorded forward: its micro-batches, its probe, and what its backward passes are asked for."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastreg.micro_batches import MicroBatches, Selection

if TYPE_CHECKING:
    from fastreg.rules.joining import Deposit
    from fastreg.rules.perturbation import Perturbation
    from fastreg.rules.spread import Leaves


class Phase(Enum):
    """What a backward pass through the recorded operations computes."""

    PLAIN = "input and parameter gradients, as autograd does"
    CHAIN = "input gradients and squared norms; no parameter gradient is formed"
    DIRECTIONS = "input gradients and squared norms; what the norms are made of is kept"
    STATISTICS = "input and parameter gradients, and squared norms with them"
    TANGENT = "of a double backward, what leads to the cotangents of the first backward alone"
    SYMBOLIC = "input gradients; zeros stand for parameter gradients, in a graph that can be differentiated"

    @property
    def takes_norms(self) -> bool:
        """Whether backward passes compute squared norms."""
        return self not in (Phase.PLAIN, Phase.SYMBOLIC, Phase.TANGENT)


@dataclass(frozen=True)
class Traced:
    """One recorded operation, for reports.

    Attributes:
        rule: name of the operation.
        form: how its micro-batch gradients are represented.
        parameters: identities of the parameters it took.
    """

    rule: str
    form: str
    parameters: tuple[int, ...]


@dataclass
class Frame:
    """Directions that gradients are projected on.

    Attributes:
        probe: leaf ``[m, r]``; the projections of micro-batch gradients are its gradient.
        vectors: ``[r, *parameter.shape]`` by parameter id; to be there before a backward pass.
    """

    probe: Tensor
    vectors: dict[int, Tensor]


class Session:
    """The state of one recorded forward pass.

    The probe is a zero vector ``[m]`` that every routed operation takes as one more input. Operations return the
    squared norm of their micro-batch gradients as *the gradient of the probe*, so autograd itself sums over layers.

    Attributes:
        probe: leaf ``[m]``, float32 (float64 for double models); of the selected micro-batches alone after
            :meth:`restrict`.
        uses: how often each parameter (by id) was used in the forward.
        per_parameter: when a dict, squared norms ``[m]`` are also added up per parameter id.
        earlier: sessions of another batch size that were given up for this one; no loss may still depend on them.
        dtypes: those in which operations were recorded.
        trace: when a list, recorded operations are noted there.
        selected: micro-batches the norms are restricted to, or None for all.
        first_order: whether nothing will be differentiated twice, so that torch's own operations serve where no
            parameter is involved.
        directions: where backward passes in the phase ``DIRECTIONS`` leave them.
        perturbation: what operations of this forward are perturbed by, or None.
        frame: directions that the gradients of all parameters are projected on, or None.
        leaves: what stands for the parameters of each micro-batch, where gradients are differentiated by them, or None.
        beside: whether torch's own operations compute outputs and gradients, and norms are computed beside them.
        inspect: called with the outputs of every part that is run again, and the session of its graph; or None.
    """

    def __init__(
        self, samples: int, size: int, dtype: torch.dtype, device: torch.device, phase: Phase = Phase.PLAIN
    ) -> None:
        self.micro_batches = MicroBatches(samples, size)
        self.probe = torch.zeros(self.micro_batches.count, dtype=dtype, device=device, requires_grad=True)
        self.uses: Counter[int] = Counter()
        self.phase = phase
        self.per_parameter: dict[int, Tensor] | None = None
        self.trace: list[Traced] | None = None
        self.dtypes: set[torch.dtype] = {dtype}
        self.earlier: list[weakref.ref[Session]] = []
        self.selected: tuple[int, ...] | None = None
        self._restricted = False
        self._selection = Selection(self.micro_batches, None)
        self.shared: list[Deposit] = []
        self.consumed = False
        self.first_order = False
        self.directions: Perturbation | None = None
        self.perturbation: Perturbation | None = None
        self.leaves: Leaves | None = None
        self.frame: Frame | None = None
        self.beside = False
        self.inspect: Callable[[Sequence[Tensor], Session], None] | None = None

    def part(self) -> Session:
        """The same for a part of the forward that is run again, with a probe and joined parameters of its own."""
        part = copy(self)
        part.probe, part.shared, part.trace = torch.zeros_like(self.probe, requires_grad=True), [], None
        return part

    @property
    def forms_gradients(self) -> bool:
        """Whether backward passes form gradients of parameters now."""
        if self.phase is Phase.DIRECTIONS:
            assert self.directions is not None
            return self.directions.with_gradients
        return self.phase in (Phase.PLAIN, Phase.STATISTICS, Phase.SYMBOLIC)

    def pick(self, *, norms_alone: bool = False) -> Selection:
        """The selected micro-batches where only norms are computed; all where an ordinary backward goes on from it."""
        chosen = self.selected if norms_alone or self.phase is Phase.CHAIN else None
        if self._selection.chosen is not chosen:
            self._selection = Selection(self.micro_batches, chosen)
        return self._selection

    def restrict(self, selected: tuple[int, ...]) -> None:
        """Take norms of these micro-batches alone, in every pass: the probe has no entries for others."""
        self.selected, self._restricted = selected, True
        self.probe = self.probe.new_zeros(len(selected), requires_grad=True)

    def masked(self, values: Tensor) -> Tensor:
        """``values [m]``, with 0 for micro-batches that are not selected."""
        pick = self.pick(norms_alone=True)
        return pick.put_segments(pick.take_segments(values))

    def project(self, directions: int) -> None:
        """Take products with so many directions too; must be said before anything is recorded."""
        probe = self.probe.new_zeros(self.micro_batches.count, directions, requires_grad=True)
        self.frame = Frame(probe, {})

    def for_probe(self, pick: Selection, squared: Tensor) -> Tensor:
        """Squared norms of the micro-batches picked as the gradient of the probe."""
        squared = squared.to(self.probe.dtype)
        if not self._restricted:
            return pick.put_segments(squared)
        return squared if pick.chosen is not None else self.pick(norms_alone=True).take_segments(squared)

    @property
    def open(self) -> bool:
        """Whether a further forward may belong to it: no backward that ends at the probe has run."""
        return not self.consumed and self.probe.grad is None

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Run backward passes of this session in ``phase``; parts left by a failed pass are dropped."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before
            self.shared.clear()

    def count_use(self, *parameters: int) -> None:
        """Note a use of each parameter. A forward re-run inside a backward (checkpointing) is not a new use."""
        if torch._C._current_graph_task_id() == -1:
            self.uses.update(parameters)

    def add_norms(self, parameter: int, squared: Tensor) -> None:
        """Collect the squared norms of one parameter when they were asked for."""
        if self.per_parameter is not None:
            known = self.per_parameter.get(parameter)
            self.per_parameter[parameter] = squared if known is None else known + squared
