"""Settings of the experiment: everything that its outcome depends on."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from fastreg.errors import FastregError
from fastreg.models import mlp, resnet18, vgg11, wide_resnet
from fastreg.recipes.cifar10 import cifar10
from fastreg.recipes.data import Dataset, digits
from fastreg.recipes.methods import FISHER_TRACE, GRAD_NORM, LARGE_BATCH, SMALL_BATCH, Method

# What the sweep on the validation split chose: docs/experiment.md.
DIGITS_METHODS = (
    Method(SMALL_BATCH, lr=0.3),
    Method(LARGE_BATCH, lr=1.0),
    Method(GRAD_NORM, lr=0.3, weight=0.075),
    Method(FISHER_TRACE, lr=1.0, weight=0.0625),
)
# Novack et al. 2022, the values of their CIFAR-10 tables.
RESNET_METHODS = (
    Method(SMALL_BATCH, lr=0.1),
    Method(LARGE_BATCH, lr=0.1),
    Method(GRAD_NORM, lr=0.1, weight=0.01),
    Method(FISHER_TRACE, lr=0.1, weight=0.01),
)
VGG_METHODS = (
    Method(SMALL_BATCH, lr=0.15),
    Method(LARGE_BATCH, lr=0.01),
    Method(GRAD_NORM, lr=0.01, weight=0.5),
    Method(FISHER_TRACE, lr=0.01, weight=0.5),
)


@dataclass(frozen=True)
class ModelRecipe:
    """How a model is built, the data set it is for, and the methods' settings on it."""

    data: str
    build: Callable[[], nn.Module]
    methods: tuple[Method, ...]


# The paper has no wide residual network: it takes the values of the other residual one.
MODELS: dict[str, ModelRecipe] = {
    "mlp": ModelRecipe("digits", lambda: mlp((64, 128, 128, 10)), DIGITS_METHODS),
    "resnet18": ModelRecipe("cifar10", lambda: resnet18(10, "batch"), RESNET_METHODS),
    "resnet18-gn": ModelRecipe("cifar10", lambda: resnet18(10, "group"), RESNET_METHODS),
    "vgg11": ModelRecipe("cifar10", lambda: vgg11(10), VGG_METHODS),
    "wide-resnet": ModelRecipe("cifar10", lambda: wide_resnet(16, 4, 10, "batch"), RESNET_METHODS),
}


@dataclass(frozen=True)
class Settings:
    """One experiment: every method with every seed, for the same number of epochs.

    Args:
        model: a key of ``MODELS``; it fixes the data set.
        methods: the methods to compare.
        seeds: each fixes the initial weights, the order of the data, the augmentation and the
            sampled labels.
        epochs: passes over the training split.
        batch_size: B, samples of a large-batch step.
        micro_batch_size: b, samples of a small-batch step and of a micro-batch of the penalty.
        chunk_size: most samples of a forward pass; larger batches accumulate gradients.
        measure_every: epochs between two measurements of the micro-batch gradient norm.
        checkpoint_every: epochs between two checkpoints.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
        threads: of torch on the CPU, which the order of summation depends on; None leaves them.

    Raises:
        FastregError: a size below one, no seed or method, repeated seeds or methods, an unknown
            model, b > B, or chunks that split micro-batches.
    """

    model: str
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    micro_batch_size: int
    chunk_size: int
    measure_every: int
    checkpoint_every: int
    device: str
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise FastregError(f"train: model must be one of {list(MODELS)}, got {self.model!r}")
        for name in ("epochs", "micro_batch_size", "chunk_size", "measure_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise FastregError(f"train: {name} must be at least 1, got {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise FastregError(f"train: threads must be at least 1 or None, got {self.threads}")
        for name in ("methods", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise FastregError(f"train: {name} must be distinct, at least one, got {values}")
        if self.batch_size < self.micro_batch_size:
            raise FastregError(
                f"train: batch_size must be at least micro_batch_size = {self.micro_batch_size}, "
                f"got {self.batch_size}"
            )
        if self.chunk_size < self.batch_size and self.chunk_size % self.micro_batch_size:
            raise FastregError(
                f"train: chunk_size must be a multiple of micro_batch_size = "
                f"{self.micro_batch_size}, got {self.chunk_size}"
            )

    @property
    def data(self) -> str:
        """Name of the data set."""
        return MODELS[self.model].data

    def to_dict(self) -> dict[str, object]:
        """Plain numbers, strings and lists, for checkpoints and JSON."""
        methods = [asdict(method) for method in self.methods]
        return {**asdict(self), "methods": methods, "seeds": list(self.seeds)}

    @staticmethod
    def from_dict(values: dict[str, object]) -> "Settings":
        """The inverse of ``to_dict``."""
        methods = tuple(Method(**method) for method in values["methods"])
        return Settings(**{**values, "methods": methods, "seeds": tuple(values["seeds"])})


# B / b = 32 on the digits. Novack et al. 2022 have B = 5120 and b = 128 on CIFAR-10.
DEFAULTS: dict[str, Settings] = {
    "digits": Settings(
        model="mlp",
        methods=DIGITS_METHODS,
        seeds=(0, 1, 2, 3, 4),
        epochs=150,
        batch_size=512,
        micro_batch_size=16,
        chunk_size=512,
        measure_every=10,
        checkpoint_every=20,
        device="cpu",
        # Steps take about a millisecond: a second thread gains little, and loses much once
        # another process wants the core.
        threads=1,
    ),
    "cifar10": Settings(
        model="resnet18",
        methods=RESNET_METHODS,
        seeds=(0, 1, 2),
        epochs=150,
        batch_size=5120,
        micro_batch_size=128,
        chunk_size=5120,
        measure_every=5,
        checkpoint_every=1,
        device="cpu",
    ),
}


def default_settings(data: str, model: str | None = None) -> Settings:
    """The settings documented for a data set and one of its models.

    Args:
        data: ``"digits"`` or ``"cifar10"``.
        model: a key of ``MODELS``; by default the data set's first.

    Returns:
        The settings.

    Raises:
        FastregError: the model is for another data set.

    Example:
        >>> default_settings("cifar10", "vgg11").methods[0].lr
        0.15
    """
    settings = DEFAULTS[data]
    if model is None:
        return settings
    if MODELS[model].data != data:
        fitting = [name for name, recipe in MODELS.items() if recipe.data == data]
        raise FastregError(f"train: model must be one of {fitting} for {data}, got {model!r}")
    return replace(settings, model=model, methods=MODELS[model].methods)


def check_directory(data: str, directory: Path | None) -> None:
    """Refuse a folder for data that is shipped, and none for data that is not.

    Raises:
        FastregError: as said.

    Example:
        >>> check_directory("digits", None)
    """
    if data == "digits" and directory is not None:
        raise FastregError(
            f"train: data-dir must be absent for digits, got {directory} "
            "(the digits come with scikit-learn)"
        )
    if data == "cifar10" and directory is None:
        raise FastregError(
            "train: data-dir must be the folder cifar-10-batches-py for cifar10, got nothing "
            "(www.cs.toronto.edu/~kriz/cifar.html)"
        )


def load_dataset(data: str, directory: Path | None) -> Dataset:
    """The data set by name; ``directory`` holds the files of those that are not shipped.

    Raises:
        FastregError: a directory is missing or not wanted, or its files are.

    Example:
        >>> load_dataset("digits", None).num_classes
        10
    """
    check_directory(data, directory)
    return digits() if directory is None else cifar10(directory)
