"""Curvature: products of Hessian, Gauss-Newton and Fisher matrices with vectors, and what is estimated from them."""

from fastreg.curvature.along import Along, curvature_along
from fastreg.curvature.density import Density, spectral_density
from fastreg.curvature.eigenvalues import top_eigenvalues
from fastreg.curvature.functions import batched_hvp, fisher_vp, ggn_vp
from fastreg.curvature.matrices import GGN, Fisher, Hessian
from fastreg.curvature.operator import CurvatureOperator
from fastreg.curvature.recurrence import Lanczos, lanczos
from fastreg.curvature.sharpness import SharpnessMargin, batch_sharpness, gradient_curvatures, sharpness_margin
from fastreg.curvature.summaries import participation_ratio, stable_rank
from fastreg.curvature.traces import Trace, trace

__all__ = [
    "GGN",
    "Along",
    "CurvatureOperator",
    "Density",
    "Fisher",
    "Hessian",
    "Lanczos",
    "SharpnessMargin",
    "Trace",
    "batch_sharpness",
    "batched_hvp",
    "curvature_along",
    "fisher_vp",
    "ggn_vp",
    "gradient_curvatures",
    "lanczos",
    "participation_ratio",
    "sharpness_margin",
    "spectral_density",
    "stable_rank",
    "top_eigenvalues",
    "trace",
]
