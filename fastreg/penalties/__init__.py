"""Penalties: one file each. A penalty is a dataclass with a weight and ``value(step) -> R``."""

from fastreg.penalties.average_jacobian import AverageJacobian
from fastreg.penalties.base import Penalty, Step
from fastreg.penalties.fisher_trace import FisherTrace
from fastreg.penalties.grad_norm import GradNorm
from fastreg.penalties.noise_trace import NoiseTrace
from fastreg.penalties.unit_jacobian import UnitJacobian
from fastreg.penalties.without_replacement import WithoutReplacement

__all__ = [
    "AverageJacobian",
    "FisherTrace",
    "GradNorm",
    "NoiseTrace",
    "Penalty",
    "Step",
    "UnitJacobian",
    "WithoutReplacement",
]
