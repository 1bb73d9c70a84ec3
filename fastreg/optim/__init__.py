"""Optimizers that wrap any other: the base keeps its parameter groups, its state and its checkpoints."""

from __future__ import annotations

from fastreg.optim.regularized import Regularized
from fastreg.optim.sam import SAM

__all__ = ["SAM", "Regularized"]
