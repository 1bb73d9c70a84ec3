"""Optimizers that wrap any other: the base keeps its parameter groups, its state and its checkpoints."""

from __future__ import annotations

from fastreg.optim.grafted import Grafted
from fastreg.optim.magnitudes import Magnitude, MicroBatchNorm, UnitNorm
from fastreg.optim.norm_trace import LoggedNorm
from fastreg.optim.regularized import Regularized
from fastreg.optim.sam import SAM

__all__ = ["SAM", "Grafted", "LoggedNorm", "Magnitude", "MicroBatchNorm", "Regularized", "UnitNorm"]
