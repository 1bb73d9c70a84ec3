"""Batch samplers for the schemes that implicit regularization tells apart, resumable and cut across ranks.

Those on a fixed partition draw the same batches from the same (size, batch_size, seed): only their order differs.
"""

from fastreg.sampling.base import EpochSampler
from fastreg.sampling.replacement import WithReplacement
from fastreg.sampling.shuffling import Cyclic, OrderAndReverse, RepeatedBatches, Shuffled

__all__ = ["Cyclic", "EpochSampler", "OrderAndReverse", "RepeatedBatches", "Shuffled", "WithReplacement"]
