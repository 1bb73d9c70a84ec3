"""fastreg: explicit forms of SGD's implicit regularizers, computed in one batched pass.

    loss = reg(loss)    # the same value; its gradient is that of loss + weight * mean_k ||g_k||^2
"""

from fastreg import curvature, noise, optim, sampling, weights
from fastreg._version import __version__
from fastreg.check import check
from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.graph_walk import trust
from fastreg.kernels import backend, explain
from fastreg.monitor import Monitor
from fastreg.penalties import (
    AverageJacobian,
    FisherTrace,
    GradNorm,
    NoiseTrace,
    Penalty,
    UnitJacobian,
    WithoutReplacement,
)
from fastreg.recompute import checkpoint, checkpoint_blocks
from fastreg.regularizer import Regularizer
from fastreg.stats import fisher_trace, micro_batch_grad_norms, per_sample_grad_norms
from fastreg.tracing import compile

__all__ = [
    "AverageJacobian",
    "FastregError",
    "FisherTrace",
    "GradNorm",
    "Monitor",
    "NoiseTrace",
    "Penalty",
    "Regularizer",
    "UnitJacobian",
    "UnsupportedOperation",
    "WithoutReplacement",
    "__version__",
    "backend",
    "check",
    "checkpoint",
    "checkpoint_blocks",
    "compile",
    "curvature",
    "explain",
    "fisher_trace",
    "micro_batch_grad_norms",
    "noise",
    "optim",
    "per_sample_grad_norms",
    "sampling",
    "trust",
    "weights",
]
