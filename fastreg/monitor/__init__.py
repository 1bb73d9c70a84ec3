"""Gradient statistics that ride on the training backward: one file for the estimators, the metrics, the sources."""

from __future__ import annotations

from fastreg.monitor.metrics import METRICS
from fastreg.monitor.monitor import Monitor

__all__ = ["METRICS", "Monitor"]
