"""The one table of tolerances. Tests compare through it and type no numbers of their own.

A result is judged by how far a float64 oracle moves when every input is perturbed by one rounding of
the accumulator (its conditioning), times ``ROUNDINGS * sqrt(reduced)`` for the roundings of a sum of
``reduced`` terms, plus one rounding of the output. Sums that cancel are thereby allowed what they must
lose, and no more. Without a perturbed oracle the magnitude of the result stands for the conditioning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Roundings per term of a reduction, a product and a sum each way, with a margin of two.
ROUNDINGS = 8.0
# Float64 is the oracle's own precision: what is left is the order of summation.
FLOAT64_RELATIVE = 1e-10


@dataclass(frozen=True)
class Comparison:
    """One output against its oracle.

    Args:
        name: for the message.
        actual: the output.
        oracle: float64, same shape.
        moved: the oracle on perturbed inputs, or None.
        reduced: terms of the longest sum.
    """

    name: str
    actual: Tensor
    oracle: Tensor
    moved: Tensor | None = None
    reduced: int = 1

    def failure(self) -> str | None:
        """What is wrong with the output, or None."""
        if self.actual.shape != self.oracle.shape:
            return f"{self.name}: shape {list(self.actual.shape)}, expected {list(self.oracle.shape)}"
        if self.actual.numel() == 0:
            return None
        error = (self.actual.double() - self.oracle).abs()
        allowed = self.allowed()
        if bool((error <= allowed).all()):
            return None
        where = int(error.nan_to_num(nan=math.inf).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(where), error.shape))
        rms = float(error.square().mean().sqrt() / self.oracle.square().mean().sqrt().clamp_min(1e-300))
        return (
            f"{self.name}: largest error {float(error.flatten()[where]):.3g} at {index}, "
            f"allowed {allowed:.3g}, relative RMS {rms:.3g}"
        )

    def allowed(self) -> float:
        """Largest admissible absolute error; indices are exact."""
        if not self.actual.is_floating_point():
            return 0.0
        step = torch.finfo(torch.float32).eps
        size = float(self.oracle.abs().max())
        moved = 0.0 if self.moved is None else float((self.moved - self.oracle).abs().max())
        conditioning = max(size, moved / step)
        if self.actual.dtype == torch.float64:
            return FLOAT64_RELATIVE * conditioning
        kind = torch.finfo(self.actual.dtype)
        # One rounding of the output; near zero its spacing no longer shrinks with it.
        rounding = kind.eps * max(size, kind.smallest_normal)
        return ROUNDINGS * math.sqrt(self.reduced) * step * conditioning + rounding


def perturbed(tensor: Tensor) -> Tensor:
    """A float64 tensor moved by one float32 rounding, relative, in random directions."""
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
    return tensor * (1 + torch.finfo(torch.float32).eps * signs)


def assert_all_close(comparisons: list[Comparison]) -> None:
    """Report every failing output together."""
    failures = [message for message in (c.failure() for c in comparisons) if message]
    assert not failures, "\n".join(failures)
