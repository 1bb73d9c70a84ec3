"""What a rule works with: lineages of tensors, and the door through which operations enter the recorded graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastreg.errors import UnsupportedOperation
from fastreg.rules.bilinear import Bilinear
from fastreg.rules.joining import Root
from fastreg.rules.perturbation import Perturbed
from fastreg.rules.routing import Routed, Tap
from fastreg.rules.use import Lineage, Use
from fastreg.session import Session, Traced


class Tape:
    """The recording of one forward pass.

    Attributes:
        session: what the recorded operations belong to.
        root: what operations take for the probe. Its backward runs after every operation's, which makes it the
            place where parameters that were used several times are put together. (Not kept with the session, which
            graph nodes refer to: a tensor there would close a cycle that is never collected.)
        lineages: for every tracked parameter, and every tensor derived from one alone, by identity: the tensor
            (kept alive, so that identities stay unique) and its lineage.
    """

    __slots__ = ("session", "root", "lineages")

    def __init__(self, session: Session, parameters: Sequence[Tensor]) -> None:
        self.session = session
        self.root = Root.apply(session, session.probe, None if session.frame is None else session.frame.probe)
        tracked = (p for p in parameters if p.requires_grad)
        self.lineages: dict[int, tuple[Tensor, Lineage]] = {id(p): (p, Lineage(p)) for p in tracked}

    @property
    def samples(self) -> int:
        """B, the number of samples of the batch."""
        return self.session.micro_batches.samples

    def lineage(self, tensor: object) -> Lineage | None:
        """The lineage of a tracked tensor; None for data and constants."""
        known = self.lineages.get(id(tensor))
        return None if known is None else known[1]

    def forget_derived(self) -> None:
        """Drop what was derived in an earlier forward; parameters stay."""
        self.lineages = {key: known for key, known in self.lineages.items() if known[1].parameter is known[0]}

    def derive(self, out: Tensor, source: Lineage, step: Callable[[Tensor], Tensor], isometric: bool) -> Tensor:
        """Note that ``out = step(t)`` for a tensor ``t`` of lineage ``source``, a linear map without samples."""
        self.lineages[id(out)] = (out, source.then(step, isometric))
        return out

    def bilinear(
        self,
        op: Bilinear,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        autocast: bool = False,
    ) -> Tensor:
        """``op(x, weight, bias)``, recorded.

        Args:
            x: the data, samples along dimension 0.
            weight, bias: parameters or tensors derived from one; those that are not tracked count as constants.
            autocast: whether the operation runs in the autocast dtype where autocast is on.

        Raises:
            UnsupportedOperation: ``x`` derives from a parameter alone.
            FastregError: ``x`` does not keep its samples along dimension 0.
        """
        use = self.use(op, x, weight, bias)
        y = self._apply(use, x, weight, bias, autocast)
        self.note(use, type(op).__name__, lambda: op.form(x, y, self.session.micro_batches))
        return y

    def use(self, op: Bilinear, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Use:
        """Check the operands of an operation and count it as a use of its parameters; raises as :meth:`bilinear`."""
        if self.lineage(x) is not None:
            raise UnsupportedOperation("both operands derive from parameters alone")
        self.session.micro_batches.rows_per_sample(x, "the input of a recorded operation")
        self.session.dtypes.add(x.dtype)
        of_weight, of_bias = self._of_parameter(weight), self._of_parameter(bias)
        self.session.count_use(*(one.key for one in (of_weight, of_bias) if one is not None))
        return Use(self.session, op, of_weight, of_bias)

    def note(self, use: Use, rule: str, form: Callable[[], str]) -> None:
        """Tell the session's trace, if it has one, how an operation was recorded."""
        if self.session.trace is not None:
            keys = tuple(lineage.key for lineage in (use.weight, use.bias) if lineage is not None)
            self.session.trace.append(Traced(rule, form(), keys))

    def _of_parameter(self, tensor: Tensor | None) -> Lineage | None:
        lineage = self.lineage(tensor)
        if lineage is None and tensor is not None and tensor.grad_fn is not None:
            raise UnsupportedOperation("its weight or bias is computed from data or from several parameters")
        return lineage

    def _apply(self, use: Use, x: Tensor, weight: Tensor | None, bias: Tensor | None, autocast: bool) -> Tensor:
        device = x.device.type
        if not (autocast and torch.is_autocast_enabled(device)):
            return self.enter(use, x, weight, bias)
        low = torch.get_autocast_dtype(device)
        self.session.dtypes.add(low)
        if self.session.beside and (x.is_cuda or (weight is not None and weight.dim() == 2)):
            # Autocast keeps the parameters it casts, and the gradients of all uses of one are added up there: bits
            # are torch's if it is left to it. On the CPU it does not know torch.convolution.
            x = x.to(low)
            return self.tap(use, use.op.forward(x, weight, bias), x, weight, bias)
        x = x.to(low) if x.is_floating_point() else x
        weight, bias = (t.to(low) if t is not None and t.is_floating_point() else t for t in (weight, bias))
        with torch.autocast(device, enabled=False):
            return self.enter(use, x, weight, bias)

    def differs(self, use: Use) -> bool:
        """Whether an operation of this forward has weights, or vectors for them, that differ between micro-batches."""
        perturbation = self.session.perturbation
        return self.session.leaves is not None or (perturbation is not None and perturbation.of(use) is not None)

    def enter(self, use: Use, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The operation as a node of the graph: recorded, at perturbed weights, or with a leaf per micro-batch."""
        if self.session.beside:
            return self.tap(use, use.op.forward(x, weight, bias), x, weight, bias)
        if self.session.leaves is not None:
            return self.session.leaves.enter(use, x, weight, bias)
        perturbation = self.session.perturbation
        direction = None if perturbation is None else perturbation.of(use)
        if perturbation is None or direction is None:
            return Routed.apply(use, x, weight, bias, self.root)
        return Perturbed.apply(use, direction, perturbation.factors, x, weight, bias)

    def tap(
        self,
        use: Use,
        y: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        before: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """``y = op(before(x), weight, bias)`` as torch computed it; squared norms are taken as its gradient passes."""
        return Tap.apply(use, before, y, *(None if t is None else t.detach() for t in (x, weight, bias)), self.root)
