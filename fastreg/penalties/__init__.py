"""Penalties: one file each. A penalty is a dataclass with a weight and ``value(step) -> R``."""

from fastreg.penalties.base import Penalty, Step
from fastreg.penalties.fisher_trace import FisherTrace
from fastreg.penalties.grad_norm import GradNorm

__all__ = ["FisherTrace", "GradNorm", "Penalty", "Step"]
