"""Settings of the experiment: everything that its outcome depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from fastreg.errors import FastregError
from fastreg.recipes.methods import DEFAULT_METHODS, PENALISED, Method
from fastreg.recipes.presets import MODELS


def _default_methods(model: str) -> tuple[Method, ...]:
    return tuple(method for method in MODELS[model].methods if method.name in DEFAULT_METHODS)


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

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for checkpoints and JSON."""
        methods = [asdict(method) for method in self.methods]
        return {**asdict(self), "methods": methods, "seeds": list(self.seeds)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Settings:
        """The inverse of ``to_dict``."""
        methods = tuple(Method(**method) for method in values["methods"])
        return Settings(**{**values, "methods": methods, "seeds": tuple(values["seeds"])})


# B / b = 32 on the digits. Novack et al. 2022 have B = 5120 and b = 128 for ResNet-18.
DEFAULTS: dict[str, Settings] = {
    "digits": Settings(
        model="mlp",
        methods=_default_methods("mlp"),
        seeds=(0, 1, 2, 3, 4),
        epochs=150,
        batch_size=512,
        micro_batch_size=16,
        chunk_size=512,
        measure_every=10,
        checkpoint_every=20,
        device="cpu",
        # Steps take about a millisecond: a second thread gains little, and loses much once another process wants the
        # core.
        threads=1,
    ),
    "cifar10": Settings(
        model="resnet18",
        methods=_default_methods("resnet18"),
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
DEFAULTS |= {
    data: replace(DEFAULTS["cifar10"], model=model, methods=_default_methods(model))
    for data, model in (("cifar100", "resnet18-cifar100"), ("svhn", "resnet18-svhn"))
}


def default_settings(data: str, model: str | None = None) -> Settings:
    """The settings documented for a data set and one of its models.

    Args:
        data: a key of ``DEFAULTS``.
        model: a key of ``MODELS``; by default the data set's first.

    Returns:
        The settings, with the methods of ``DEFAULT_METHODS``.

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
    return replace(settings, model=model, methods=_default_methods(model))


def preset(model: str, name: str, lr: float | None = None, weight: float | None = None) -> Method:
    """A method with its settings on a model, or with others.

    Args:
        model: a key of ``MODELS``.
        name: of the method.
        lr, weight: in place of the model's.

    Returns:
        The method.

    Raises:
        FastregError: the model has no settings for the method, and not all are given.

    Example:
        >>> preset("resnet18-cifar100", "average_jacobian")
        Method(name='average_jacobian', lr=0.1, weight=5e-05)
    """
    known = {method.name: method for method in MODELS[model].methods}.get(name)
    if known is None and (lr is None or (weight is None and name in PENALISED)):
        raise FastregError(
            f"train: lr and weight must be given for {name} on {model}, got none (--lr {name}=..., and --weight for a "
            "penalty; the model comes without)"
        )
    if known is None:
        assert lr is not None
        return Method(name, lr, weight or 0.0)
    return Method(name, known.lr if lr is None else lr, known.weight if weight is None else weight)
