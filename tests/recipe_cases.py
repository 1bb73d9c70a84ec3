"""Settings and data small enough for tests of the recipes."""

from dataclasses import replace

from fastreg.recipes.data import Dataset, Split
from fastreg.recipes.datasets import load_dataset
from fastreg.recipes.methods import (
    AVERAGE_JACOBIAN,
    EXTERNAL_GRAFTING,
    FISHER_TRACE,
    GRAD_NORM,
    ITERATIVE_GRAFTING,
    LARGE_BATCH,
    NORMALIZED,
    SMALL_BATCH,
    UNIT_JACOBIAN,
    Method,
)
from fastreg.recipes.settings import Settings, default_settings

METHODS = (
    Method(SMALL_BATCH, lr=0.1),
    Method(LARGE_BATCH, lr=0.5),
    Method(GRAD_NORM, lr=0.5, weight=0.1),
    Method(FISHER_TRACE, lr=0.5, weight=0.1),
)
# The further methods of Novack et al. 2022, arXiv:2211.15853.
NOVACK_METHODS = (
    Method(AVERAGE_JACOBIAN, lr=0.5, weight=0.01),
    Method(UNIT_JACOBIAN, lr=0.5, weight=0.01),
    Method(ITERATIVE_GRAFTING, lr=0.5),
    Method(EXTERNAL_GRAFTING, lr=0.5),
    Method(NORMALIZED, lr=0.1),
)


def small_digits() -> Dataset:
    """The digits with 128 training samples."""
    whole = load_dataset("digits", None)
    return replace(whole, train=Split(whole.train.inputs[:128], whole.train.targets[:128]))


def tiny(**changes: object) -> Settings:
    settings = replace(
        default_settings("digits"),
        methods=METHODS,
        seeds=(0, 1),
        epochs=3,
        batch_size=64,
        micro_batch_size=16,
        chunk_size=64,
        measure_every=2,
        checkpoint_every=1,
    )
    return replace(settings, **changes)
