"""The noise of minibatch gradients: its covariance, what it does to trajectories, and where it leads.

Closed forms for linear regression are in :mod:`fastreg.noise.regression`.
"""

from fastreg.noise.alignment import Alignment, CurvatureNoise, alignment
from fastreg.noise.cosines import gradient_cosines
from fastreg.noise.covariance import NoiseCovariance
from fastreg.noise.displacement import DisplacementReport, measured_vs_predicted
from fastreg.noise.drift import drift_weight, eigenbasis_drift, flat_drift_weight, without_replacement_drift
from fastreg.noise.expansion import EpochExpansion, cyclic_bracket, epoch_expansion
from fastreg.noise.hill import hill_estimator, hill_plot
from fastreg.noise.modified_loss import modified_loss, modified_loss_gradient
from fastreg.noise.scale import NoiseScale, noise_scale
from fastreg.noise.stability import stability_load
from fastreg.noise.tails import TailIndex, continuous_index, kesten_index, tail_index, ziyin_index

__all__ = [
    "Alignment",
    "CurvatureNoise",
    "DisplacementReport",
    "EpochExpansion",
    "NoiseCovariance",
    "NoiseScale",
    "TailIndex",
    "alignment",
    "continuous_index",
    "cyclic_bracket",
    "drift_weight",
    "eigenbasis_drift",
    "epoch_expansion",
    "flat_drift_weight",
    "gradient_cosines",
    "hill_estimator",
    "hill_plot",
    "kesten_index",
    "measured_vs_predicted",
    "modified_loss",
    "modified_loss_gradient",
    "noise_scale",
    "stability_load",
    "tail_index",
    "without_replacement_drift",
    "ziyin_index",
]
