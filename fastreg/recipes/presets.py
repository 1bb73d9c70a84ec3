"""The settings of every method on every model, and where they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fastreg.models import mlp, resnet18, vgg11, wide_resnet
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

# What the sweep on the validation split chose: docs/experiment.md.
DIGITS_METHODS = (
    Method(SMALL_BATCH, lr=0.3),
    Method(LARGE_BATCH, lr=1.0),
    Method(GRAD_NORM, lr=0.3, weight=0.075),
    Method(FISHER_TRACE, lr=1.0, weight=0.0625),
    Method(AVERAGE_JACOBIAN, lr=1.0, weight=0.00390625),
    Method(UNIT_JACOBIAN, lr=1.0, weight=0.00390625),
    Method(ITERATIVE_GRAFTING, lr=0.3),
    Method(EXTERNAL_GRAFTING, lr=0.3),
    Method(NORMALIZED, lr=1.0),
)
# Novack et al. 2022, the values of their tables for ResNet-18 and VGG-11. They give the rate of normalized steps but
# none for grafting: grafted steps take that of the small batch, whose lengths they take too.
CIFAR10_METHODS = (
    Method(SMALL_BATCH, lr=0.1),
    Method(LARGE_BATCH, lr=0.1),
    Method(GRAD_NORM, lr=0.1, weight=0.01),
    Method(FISHER_TRACE, lr=0.1, weight=0.01),
    Method(AVERAGE_JACOBIAN, lr=0.1, weight=0.001),
    Method(UNIT_JACOBIAN, lr=0.1, weight=0.001),
    Method(ITERATIVE_GRAFTING, lr=0.1),
    Method(EXTERNAL_GRAFTING, lr=0.1),
    Method(NORMALIZED, lr=0.2626),
)
CIFAR100_METHODS = (
    Method(SMALL_BATCH, lr=0.1),
    Method(LARGE_BATCH, lr=0.5),
    Method(GRAD_NORM, lr=0.1, weight=0.01),
    Method(FISHER_TRACE, lr=0.1, weight=0.01),
    Method(AVERAGE_JACOBIAN, lr=0.1, weight=5e-5),
    Method(UNIT_JACOBIAN, lr=0.1, weight=0.001),
    Method(ITERATIVE_GRAFTING, lr=0.1),
    Method(EXTERNAL_GRAFTING, lr=0.1),
    Method(NORMALIZED, lr=0.3951),
)
# The paper has no unit Jacobian and no grafting on VGG-11.
VGG_METHODS = (
    Method(SMALL_BATCH, lr=0.15),
    Method(LARGE_BATCH, lr=0.01),
    Method(GRAD_NORM, lr=0.01, weight=0.5),
    Method(FISHER_TRACE, lr=0.01, weight=0.5),
    Method(AVERAGE_JACOBIAN, lr=0.01, weight=2e-5),
)


@dataclass(frozen=True)
class ModelRecipe:
    """How a model is built, the data set it is for, and the methods' settings on it."""

    data: str
    build: Callable[[], nn.Module]
    methods: tuple[Method, ...]


# Group norm, the wide residual network and SVHN take the values of the paper's residual network on CIFAR-10: they are
# a start there, not the paper's.
MODELS: dict[str, ModelRecipe] = {
    "mlp": ModelRecipe("digits", lambda: mlp((64, 128, 128, 10)), DIGITS_METHODS),
    "resnet18": ModelRecipe("cifar10", lambda: resnet18(10, "batch"), CIFAR10_METHODS),
    "resnet18-gn": ModelRecipe("cifar10", lambda: resnet18(10, "group"), CIFAR10_METHODS),
    "vgg11": ModelRecipe("cifar10", lambda: vgg11(10), VGG_METHODS),
    "wide-resnet": ModelRecipe("cifar10", lambda: wide_resnet(16, 4, 10, "batch"), CIFAR10_METHODS),
    "resnet18-cifar100": ModelRecipe("cifar100", lambda: resnet18(100, "batch"), CIFAR100_METHODS),
    "resnet18-svhn": ModelRecipe("svhn", lambda: resnet18(10, "batch"), CIFAR10_METHODS),
}
