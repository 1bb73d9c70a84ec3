"""One use of an operation in a recorded forward: which of its parameters are tracked, and how they derive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastreg.rules.bilinear import Bilinear
from fastreg.session import Session


@dataclass(frozen=True, slots=True)
class Lineage:
    """A tensor computed from one parameter by a linear map that involves no sample.

    Attributes:
        parameter: the parameter.
        lift: the linear map, from the parameter to the tensor; None for the parameter itself.
        isometric: whether the transposed map keeps Euclidean norms (views, transposes, slices do; a gather with
            repeated rows does not).
    """

    parameter: Tensor
    lift: Callable[[Tensor], Tensor] | None = None
    isometric: bool = True

    @property
    def key(self) -> int:
        """The parameter's identity."""
        return id(self.parameter)

    def then(self, step: Callable[[Tensor], Tensor], isometric: bool) -> Lineage:
        """The lineage of ``step`` applied to this tensor."""
        lift = self.lift
        return Lineage(
            self.parameter, step if lift is None else lambda p: step(lift(p)), self.isometric and isometric
        )

    def lift_each(self, gradients: Tensor) -> Tensor:
        """The map applied to each of ``gradients [m, *parameter.shape]``."""
        return gradients if self.lift is None else torch.vmap(self.lift)(gradients)

    def transpose_lift(self, gradients: Tensor) -> Tensor:
        """The transposed map applied to each of ``gradients [m, *tensor.shape]``: ``[m, *parameter.shape]``."""
        if self.lift is None:
            return gradients
        transposed: Callable[[Tensor], tuple[Tensor]] = torch.func.vjp(self.lift, self.parameter.detach())[1]
        return torch.vmap(lambda g: transposed(g)[0])(gradients)


@dataclass(frozen=True, slots=True)
class Use:
    """A routed operation, its session, and the lineage of its tracked weight and bias (None if not tracked)."""

    session: Session
    op: Bilinear
    weight: Lineage | None
    bias: Lineage | None

    def alone(self, lineage: Lineage | None) -> bool:
        """Whether this use alone makes up the parameter's gradient, so that its norm is the parameter's.

        What is projected on a frame is formed as one, at the root.
        """
        if lineage is None or not lineage.isometric or self.session.frame is not None:
            return False
        return self.session.uses[lineage.key] == 1

    @property
    def shared(self) -> bool:
        """Whether a parameter of this use has others, so that the root joins them."""
        return any(lineage is not None and not self.alone(lineage) for lineage in (self.weight, self.bias))
